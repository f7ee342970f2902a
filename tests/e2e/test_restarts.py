"""`launch.max_restarts`: failed ranks are started again where that may cure it, and people see why they failed."""

from __future__ import annotations

import os
import signal

import pytest
from helpers.cli import SMOKE, anyshard, finish, happened, plugin, rank_pids, start, steps, wait_for

pytestmark = pytest.mark.e2e

AGAIN = [*SMOKE, "run.dir=run", "launch.max_restarts=2", "launch.backoff_s=0.5", "train.eval_every_steps=0"]


def test_killed_ranks_are_started_again_and_go_on(tmp_path):
    run = tmp_path / "run"
    endless = ["train.max_steps=100000", "checkpoint.every_steps=5", "resume=never"]
    process = start("train", *AGAIN, *endless, cwd=tmp_path)
    wait_for(lambda: len(happened(run, "commit")) >= 2, process)
    os.kill(rank_pids(process)[1], signal.SIGKILL)
    (restored,) = wait_for(lambda: happened(run, "restore"), process)
    assert restored["step"] >= 10
    seen = len(steps(run))
    wait_for(lambda: len(steps(run)) > seen, process)
    process.terminate()
    code, _, err = finish(process)
    assert code == 75, err
    assert "rank 1 was ended by SIGKILL" in err
    assert "restart 1 of 2 without a new checkpoint, in 0.5 s" in err
    assert len(happened(run, "start")) == 2


PICKY = """
    def on_step_end(self, trainer, record):
        if trainer.rank == 1 and trainer.progress.step == 3:
            raise BaseException("rank 1 will not")
"""


def test_an_error_that_comes_again_is_not_tried_a_third_time(tmp_path):
    env = plugin(tmp_path, "picky", PICKY)
    done = anyshard("train", *AGAIN, "launch.max_restarts=9", "callbacks.picky={}", cwd=tmp_path, env=env)
    assert done.returncode == 1, done.stderr
    assert len(happened(tmp_path / "run", "start")) == 2
    assert done.stderr.count("BaseException: rank 1 will not") == 2
    assert "closed by peer" not in done.stderr  # rank 0's words are a consequence
    assert "not started again: it failed twice in the same way at the same place" in done.stderr
    log = (tmp_path / "run" / "logs" / "rank00001.log").read_text()
    assert log.count("rank 1 will not") >= 2  # the log of each attempt is kept


def test_a_wrong_configuration_is_never_tried_again(tmp_path):
    done = anyshard("train", *AGAIN, "data.max_tokens=10", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert len(happened(tmp_path / "run", "start")) == 1
    assert "not started again: a restart would not cure that" in done.stderr
