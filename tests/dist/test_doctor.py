"""`anyshard doctor` on this machine, with its children."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from helpers.ranks import run_ranks

pytestmark = pytest.mark.dist


def test_doctor_runs_a_collective_on_all_ranks_and_prints_json() -> None:
    command = [sys.executable, "-m", "anyshard", "doctor", "--dist", "--nproc", "2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode in (0, 3), done.stderr
    report = json.loads(done.stdout)
    found = {check["name"]: check for check in report["checks"]}
    assert report["ok"] == (done.returncode == 0)
    assert found["torch devices"]["mark"] == "ok"
    assert found["all-reduce on 2 ranks"]["mark"] == "ok"
    assert "us for 8 bytes" in found["all-reduce on 2 ranks"]["found"]


def _bandwidth() -> dict[str, object]:
    import torch

    from anyshard.parallel.collective_check import report

    return report(torch.device("cpu"))


def _wrong_sum() -> None:
    import torch
    import torch.distributed as dist

    from anyshard.parallel import collective_check

    dist.all_reduce = lambda tensor: None  # a collective that does nothing
    collective_check.measure(8, torch.device("cpu"), repeats=1)


def test_every_rank_measures() -> None:
    for result in run_ranks(_bandwidth, 2):
        assert result["world_size"] == 2
        assert result["latency_us"] > 0
        assert result["bus_gb_per_s"] > 0


def test_a_wrong_sum_is_noticed() -> None:
    with pytest.raises(AssertionError, match=r"the sum of ones over 2 ranks is 1\.0"):
        run_ranks(_wrong_sum, 2, fresh=True)
