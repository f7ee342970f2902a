"""Ranks agree on wishes: one rank has them, all act at the same step."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch.distributed as dist
from helpers.ranks import run_ranks

from anyshard.configs import schema
from anyshard.trainer.stop import AGREE_EVERY_S, Signals, StopControl

pytestmark = pytest.mark.dist


def _steps_until(what: str, run_dir: str, step_s: float, wish_at: int) -> tuple[int, int]:
    """The step at which this rank is told to save or stop, and how many agreements there were."""
    signals = Signals(training=True)
    group = dist.new_group(backend="gloo")
    stops = StopControl(schema.Stop(), Path(run_dir), signals, group, dist.get_rank())
    begun, last = 0, None
    for step in range(1, 2000):
        time.sleep(step_s * (1 + dist.get_rank()))
        if step == wish_at and what == "signal" and dist.get_rank() == 1:
            signals.received = 15
        if step == wish_at and what == "SAVE" and dist.get_rank() == 0:
            (Path(run_dir) / "SAVE").touch()
        decision = stops.decide(step)
        begun, last = begun + (stops._work is not last), stops._work
        if decision.stop or decision.save:
            stops.drain()
            return step, begun
    raise AssertionError("nothing was decided")


@pytest.mark.parametrize("what", ["signal", "SAVE"])
def test_short_steps_share_an_agreement_and_all_ranks_act_at_the_same_step(tmp_path, what):
    (step, agreements), (other, _) = run_ranks(_steps_until, 2, what=what, run_dir=str(tmp_path), step_s=0.002, wish_at=100)
    assert step == other
    assert 100 < step <= 100 + 3 * AGREE_EVERY_S / 0.002
    assert agreements < step / 2


def test_steps_that_take_long_agree_each_time_and_act_one_step_later(tmp_path):
    steps = run_ranks(_steps_until, 2, what="signal", run_dir=str(tmp_path), step_s=AGREE_EVERY_S, wish_at=4)
    assert [step for step, _ in steps] == [5, 5]
