"""Two hosts with a network between them (namespaces on this machine): torchrun and the deepspeed launcher across them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.cli import environment, happened, steps
from helpers.hosts import Host, hosts, pids_in, why_not

pytestmark = pytest.mark.e2e

TWO = ["debug=smoke", "cluster=cpu", "launch.nodes=2", "launch.procs_per_node=1", "train.eval_every_steps=0", "run.dir=run"]
ENDLESS = ["train.max_steps=100000", "checkpoint.every_steps=0"]


@pytest.fixture
def two() -> Iterator[list[Host]]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with hosts(2) as made:
        try:
            yield made
        finally:
            for pid in pids_in(made):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def on(host: Host, cwd: Path, *argv: str) -> subprocess.Popen[str]:
    """Start python there."""
    return subprocess.Popen(
        host.command(sys.executable, *argv),
        cwd=cwd,
        env=environment(GLOO_SOCKET_IFNAME="eth0", TP_SOCKET_IFNAME="eth0"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(condition, *processes, timeout_s=90.0):
    until = time.monotonic() + timeout_s
    while not condition():
        ended = [process for process in processes if process.poll() is not None]
        assert not ended, "\n".join("".join(process.communicate()) for process in ended)
        assert time.monotonic() < until, f"not within {timeout_s} s"
        time.sleep(0.05)


def torchrun(two: list[Host], cwd: Path, *more: str) -> list[subprocess.Popen[str]]:
    first = on(two[0], cwd, "-m", "anyshard", "train", *TWO, *ENDLESS, "launch=torchrun", "launch.torchrun.host=n0", *more)
    wait_until(lambda: (cwd / "run/logs/launcher.log").exists(), first)
    second = on(two[1], cwd, "-m", "anyshard.launch.node", str(cwd / "run"), "--node-rank=1")
    wait_until(lambda: len(steps(cwd / "run")) > 1, first, second)
    return [first, second]


def test_a_cable_that_is_cut_is_noticed_in_seconds_and_the_host_is_named(two, tmp_path):
    run = tmp_path / "run"
    first, second = torchrun(two, tmp_path, "launch.lost_after_s=3")
    (start,), (preflight,) = happened(run, "start"), happened(run, "preflight")
    assert start["hosts"] == ["n0", "n1"]
    assert [line.split(":")[0] for line in preflight["nodes"]] == ["n0", "n1"]
    two[1].cable(plugged=False)
    cut = time.monotonic()
    out, err = first.communicate(timeout=90)
    took_s = time.monotonic() - cut
    assert first.returncode == 1, out + err
    assert "HostLostError: n1 is silent for" in err
    (lost,) = happened(run, "host_lost")
    assert lost["host"] == "n1"
    assert lost["silent_s"] < 6
    assert took_s < 20
    out, err = second.communicate(timeout=90)
    assert second.returncode == 1, out + err
    assert "n0 is silent for" in err


def test_the_deepspeed_launcher_on_two_hosts(two, tmp_path):
    """By hand on every host, as where no ssh leads from one to the other."""
    options = ["launch=deepspeed", "launch.deepspeed.hosts=[n0,n1]", "launch.deepspeed.runner=no_ssh", "launch.port=29511"]
    first = on(two[0], tmp_path, "-m", "anyshard", "train", *TWO, *ENDLESS, *options, "stop.at_step=20")
    run = tmp_path / "run"
    wait_until(lambda: (run / "launch/deepspeed.env").exists(), first)
    command = ["-m", "deepspeed.launcher.runner", "--hostfile", str(run / "launch/hostfile"), "--no_ssh", "--node_rank", "1"]
    command += ["--master_addr", "n0", "--master_port", "29511", "--module", "anyshard.trainer.run", "--run-dir", str(run)]
    second = on(two[1], tmp_path, *command)
    out, err = first.communicate(timeout=240)
    assert first.returncode == 75, out + err
    second.communicate(timeout=90)
    assert happened(run, "start")[0]["hosts"] == ["n0", "n1"]
    assert happened(run, "commit")[-1]["step"] == 20
