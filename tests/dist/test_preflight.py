"""All nodes are looked at before the first step: each rank of the pool is a node here, and one of them is unlike the others."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import run_ranks

from anyshard.configs.errors import EnvError
from anyshard.configs.schema import Config, NodeCheck
from anyshard.parallel import heartbeat
from anyshard.parallel.preflight import Preflight
from anyshard.parallel.rank_env import RankEnv
from anyshard.trainer.node_check import check_nodes, listen_to_nodes

pytestmark = pytest.mark.dist


def _check(tag: str, odd: int | None, how: str, per_node: int = 1) -> tuple[list[str], list[str], bool]:
    """On a rank: the hosts, the findings, and whether an all-reduce of all was timed."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    env = RankEnv(rank, rank % per_node, world_size, per_node, "127.0.0.1", 1)
    check = Preflight(env, torch.device("cpu"), timeout_s=3.0, tag=tag, host=f"n{rank // per_node}")
    mm, isend, before = torch.mm, dist.isend, os.environ.get("NCCL_DEBUG")
    try:
        if rank == odd and how == "computes":
            torch.mm = lambda a, b: (time.sleep(0.7), mm(a, b))[1]
        if rank == odd and how == "sends":
            dist.isend = lambda *given: (time.sleep(0.7), isend(*given))[1]
        if rank == odd and how == "silent":
            check._meet("begin")  # and then it hangs
            return [], [], False
        if rank == odd and how == "environment":
            os.environ["NCCL_DEBUG"] = "INFO"
        if rank == odd and how == "version":
            describe = check._describe
            check._describe = lambda: replace(describe(), versions={**describe().versions, "torch": "1.0"})
        nodes, findings = check.run(slow_factor=6.0)
    finally:
        torch.mm, dist.isend = mm, isend
        os.environ.pop("NCCL_DEBUG", None)
        if before is not None:
            os.environ["NCCL_DEBUG"] = before
    return [node.host for node in nodes], [str(finding) for finding in findings], check.across_s is not None


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("computes", "n2: a matrix product takes"),
        ("sends", "n2: an exchange with its fastest partner takes"),
        ("environment", "n2: NCCL_DEBUG is INFO, elsewhere not set"),
        ("version", "n2: torch is 1.0, elsewhere 2"),
    ],
)
def test_the_node_that_is_unlike_the_others_is_named(how, told):
    answers = run_ranks(_check, 4, tag=how, odd=2, how=how)
    assert all(answer == answers[0] for answer in answers)
    hosts, findings, timed = answers[0]
    assert hosts == ["n0", "n1", "n2", "n3"]
    assert any(finding.startswith(told) for finding in findings), findings
    assert timed == (how != "version")


def test_ranks_of_a_node_are_one_node():
    hosts, findings, timed = run_ranks(_check, 4, tag="two", odd=None, how="", per_node=2)[0]
    assert hosts == ["n0", "n1"]
    assert timed
    assert not [finding for finding in findings if "cannot reach" in finding]


def _without_one() -> str:
    try:
        _check("silent", 1, "silent")
    except EnvError as error:
        return str(error)
    return ""


def test_a_node_that_does_not_answer_is_named():
    told = run_ranks(_without_one, 2)
    assert "n1 (rank 1) did not answer within 3 s" in told[0]
    assert "launch.preflight_timeout_s" in told[0]


class Told(list):  # type: ignore[type-arg]
    """A reporter that keeps what it is told."""

    def say(self, text: str) -> None:
        self.append(text)

    def event(self, kind: str, **details: Any) -> None:
        self.append(kind)


def _glue(how: str, choice: str) -> tuple[str, list[str]]:
    """On a rank: the error of the check before training, if any, and what people were told."""
    rank, told, mm = dist.get_rank(), Told(), torch.mm
    env = RankEnv(rank, 0, dist.get_world_size(), 1, "127.0.0.1", 1)
    config = Config()
    config.launch.preflight, config.launch.slow_factor = NodeCheck(choice), 6.0
    os.environ["TORCHELASTIC_RESTART_COUNT"] = f"{how}-{choice}"  # a name of its own in the store
    try:
        if rank == 2 and how == "computes":
            torch.mm = lambda a, b: (time.sleep(0.7), mm(a, b))[1]
        check_nodes(config, env, torch.device("cpu"), told)  # type: ignore[arg-type]
    except EnvError as error:
        return str(error), told
    finally:
        torch.mm = mm
        del os.environ["TORCHELASTIC_RESTART_COUNT"]
    return "", told


def test_a_slow_node_is_named_and_refused_where_that_is_wished():
    errors = [run_ranks(_glue, 4, how="computes", choice=choice)[0] for choice in ("warn", "strict", "skip")]
    (warned, told), (refused, _), (skipped, nothing) = errors
    assert warned == skipped == ""
    assert any("WARNING: " in line and "(node 2): a matrix product takes" in line for line in told)
    assert refused.startswith("preflight: ")
    assert "launch.preflight=skip" in refused
    assert nothing == []


def _unreachable() -> str:
    heartbeat.MEET_S, before = 1.0, heartbeat.MEET_S
    rank = dist.get_rank()
    env = RankEnv(rank, 0, 2, 1, "nowhere.invalid", 1)
    group = dist.new_group(backend="gloo")
    try:
        listen_to_nodes(Config(), env, group, ["n0", "n1"], Told(), lambda error, host: None)  # type: ignore[arg-type]
    except EnvError as error:
        return str(error)
    finally:
        heartbeat.MEET_S = before
    return ""


def test_nodes_that_cannot_connect_say_what_to_turn_off():
    for told in run_ranks(_unreachable, 2):
        assert told.startswith("launch.lost_after_s=30: the nodes cannot connect to n0 (nowhere.invalid, port ")
        assert "launch.lost_after_s=null" in told
