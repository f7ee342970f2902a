"""What every registered schedule must do; a new one is tested by being registered."""

from __future__ import annotations

import itertools
import random

import pytest

from anyshard.configs import schema
from anyshard.configs.registry import lookup, names
from anyshard.trainer.optim.schedules import num_steps

MAX_STEPS = 100
CASES = list(itertools.product(names("schedule"), (0, 1, 10, 0.2)))


def _factor(name: str, warmup: int | float, max_steps: int = MAX_STEPS, **keys: object):
    schedule = schema.Schedule(name=name, warmup_steps=warmup, **{"min_lr_ratio": 0.1, **keys})  # type: ignore[arg-type]
    return lookup("schedule", name, key="schedule.name")(schedule, max_steps)


@pytest.mark.parametrize(("name", "warmup"), CASES)
def test_warms_up_from_above_zero_to_the_peak(name: str, warmup: int | float) -> None:
    factor, steps = _factor(name, warmup), num_steps(warmup, MAX_STEPS)
    rise = [factor(step) for step in range(max(steps, 1))]
    assert rise[0] > 0
    assert all(a < b for a, b in itertools.pairwise(rise))
    assert rise[-1] == 1


@pytest.mark.parametrize(("name", "warmup"), CASES)
def test_never_above_the_peak_and_never_rises_again(name: str, warmup: int | float) -> None:
    factor, steps = _factor(name, warmup), num_steps(warmup, MAX_STEPS)
    values = [factor(step) for step in range(max(steps - 1, 0), MAX_STEPS + 50)]
    assert all(0.1 - 1e-12 <= value <= 1 for value in values)
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(values))


@pytest.mark.parametrize("name", [name for name in names("schedule") if name != "constant"])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0])
def test_ends_at_the_smallest_rate(name: str, ratio: float) -> None:
    factor = _factor(name, 10, min_lr_ratio=ratio)
    assert factor(MAX_STEPS - 1) == pytest.approx(ratio, abs=1e-12)
    assert factor(MAX_STEPS + 1000) == pytest.approx(ratio, abs=1e-12)


@pytest.mark.parametrize(("name", "warmup"), CASES)
def test_does_not_depend_on_what_was_asked_before(name: str, warmup: int | float) -> None:
    steps = list(range(MAX_STEPS))
    in_order = [_factor(name, warmup)(step) for step in steps]
    factor, shuffled = _factor(name, warmup), random.Random(0).sample(steps, len(steps))
    assert {step: factor(step) for step in shuffled} == dict(zip(steps, in_order, strict=True))


@pytest.mark.parametrize("name", names("schedule"))
@pytest.mark.parametrize("max_steps", [1, 2])
@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_survives_very_short_runs(name: str, max_steps: int, warmup: int) -> None:
    assert all(0 < _factor(name, warmup, max_steps)(step) <= 1 for step in range(max_steps))
