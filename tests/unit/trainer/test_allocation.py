import time
from datetime import datetime

import pytest

from anyshard.trainer.allocation import MARGIN_S, Allocation, find_allocation, job_end


@pytest.fixture
def squeue(monkeypatch, tmp_path):
    """A squeue that shows what it is told; a number is that many seconds from now."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def show(what):
        text = what if isinstance(what, str) else datetime.fromtimestamp(time.time() + what).isoformat(timespec="seconds")
        (tmp_path / "squeue").write_text(f"#!/bin/sh\necho '{text}'\n")
        (tmp_path / "squeue").chmod(0o755)

    return show


def test_the_end_of_a_job(squeue):
    squeue(3600)
    found = find_allocation({"SLURM_JOB_ID": "7"}, None)
    assert found.ends_at == pytest.approx(time.time() + 3600, abs=2)
    assert (found.job_id, found.margin_s) == ("7", MARGIN_S)
    assert not found.is_over()


@pytest.mark.parametrize("shown", ["N/A", "", "Unknown"])
def test_a_job_without_a_limit(squeue, shown):
    squeue(shown)
    assert find_allocation({"SLURM_JOB_ID": "7"}, None) is None


def test_outside_of_slurm(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_allocation({}, None) is None
    assert job_end("7") is None


def test_a_short_job_is_not_stopped_at_once(squeue):
    squeue(100)
    assert find_allocation({"SLURM_JOB_ID": "7"}, None).margin_s == pytest.approx(10, abs=1)
    assert find_allocation({"SLURM_JOB_ID": "7"}, 30.0).margin_s == 30


def test_a_limit_that_was_raised_counts(squeue):
    allocation = Allocation("7", time.time() + 10, margin_s=20)
    squeue(1000)
    assert not allocation.is_over()
    squeue(15)
    allocation.ends_at = time.time() + 15
    assert allocation.is_over()


def test_the_time_that_a_save_takes_is_left_for_it(squeue):
    squeue(1000)
    found = find_allocation({"SLURM_JOB_ID": "7"}, None)
    assert not found.is_over(needed_s=300)
    found.ends_at = time.time() + 440
    squeue(440)
    assert found.is_over(needed_s=300)
    assert not found.is_over(needed_s=200)
    squeue(1000)
    found = find_allocation({"SLURM_JOB_ID": "7"}, 30.0)
    assert not found.is_over(needed_s=900)  # what was asked for wins
    found = find_allocation({"SLURM_JOB_ID": "7"}, None)
    assert not found.is_over(needed_s=5000)  # and half of the time is for training
