"""Values of the schedules at chosen steps."""

from __future__ import annotations

import math

import pytest

from anyshard.configs import schema
from anyshard.trainer.optim.schedules import constant, cosine, linear, num_steps, wsd


@pytest.mark.parametrize(("value", "steps"), [(0, 0), (0.0, 0), (5, 5), (5.0, 5), (0.1, 20), (0.999, 200), (1, 1)])
def test_num_steps(value: int | float, steps: int) -> None:
    assert num_steps(value, 200) == steps


def test_linear_and_cosine_at_the_middle() -> None:
    schedule = schema.Schedule(warmup_steps=0, min_lr_ratio=0.2)
    assert linear(schedule, 101)(50) == pytest.approx(0.6)
    assert cosine(schedule, 101)(50) == pytest.approx(0.6)
    assert cosine(schedule, 101)(25) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)


def test_warm_up_is_a_straight_line() -> None:
    factor = constant(schema.Schedule(warmup_steps=4), 10)
    assert [factor(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_wsd_stays_and_then_falls() -> None:
    factor = wsd(schema.Schedule(warmup_steps=10, decay_steps=0.4, min_lr_ratio=0.0), 101)
    assert {factor(step) for step in range(9, 61)} == {1.0}
    assert factor(70) == pytest.approx(1 - math.sqrt(0.25))
    assert factor(100) == 0


def test_wsd_without_decay_drops_at_the_end() -> None:
    factor = wsd(schema.Schedule(warmup_steps=0, decay_steps=0, min_lr_ratio=0.5), 10)
    assert [factor(step) for step in (0, 8, 9, 10)] == [1.0, 1.0, 1.0, 0.5]
