"""Learning-rate schedules: pure functions of the step, so a resumed run needs no schedule state.

A schedule gives the factor of the peak learning rate that optimizer step number `step` (from 0) uses. All warm up linearly
over `schedule.warmup_steps`: step 0 uses 1/warmup and the last warm-up step uses 1. What decays reaches its end at the
last step of the run and stays there.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from anyshard.configs import schema

Factor = Callable[[int], float]


def num_steps(value: int | float, max_steps: int) -> int:
    """Steps meant by a key that counts steps, or gives a fraction below 1 of `max_steps`."""
    return round(value * max_steps) if 0 < value < 1 else int(value)


def constant(schedule: schema.Schedule, max_steps: int) -> Factor:
    """Warm up, then stay at the peak."""
    return _shaped(schedule, max_steps, lambda step, start, end: 1.0)


def linear(schedule: schema.Schedule, max_steps: int) -> Factor:
    """Warm up, then fall in a straight line to `min_lr_ratio` at the last step."""
    floor = schedule.min_lr_ratio
    return _shaped(schedule, max_steps, lambda step, start, end: 1 - (1 - floor) * _progress(step, start, end))


def cosine(schedule: schema.Schedule, max_steps: int) -> Factor:
    """Warm up, then fall along half a cosine to `min_lr_ratio` at the last step.

    Source: SGDR, Loshchilov and Hutter, arXiv 1608.03983, equation 5, one cycle.
    """
    floor = schedule.min_lr_ratio

    def shape(step: int, start: int, end: int) -> float:
        return floor + (1 - floor) * (1 + math.cos(math.pi * _progress(step, start, end))) / 2

    return _shaped(schedule, max_steps, shape)


def wsd(schedule: schema.Schedule, max_steps: int) -> Factor:
    """Warm up, stay at the peak, and fall to `min_lr_ratio` over the last `decay_steps`, as one minus a square root.

    Source: the three phases, MiniCPM, arXiv 2404.06395, section 4; the shape of the decay, arXiv 2405.18392, section 3.
    """
    floor = schedule.min_lr_ratio
    decay = num_steps(schedule.decay_steps, max_steps)

    def shape(step: int, start: int, end: int) -> float:
        return 1 - (1 - floor) * math.sqrt(_progress(step, max(start, end - decay), end))

    return _shaped(schedule, max_steps, shape)


def _shaped(schedule: schema.Schedule, max_steps: int, shape: Callable[[int, int, int], float]) -> Factor:
    """Warm-up, then `shape(step, start, end)`, where the peak is at `start` and the last step of the run is `end`."""
    warmup = num_steps(schedule.warmup_steps, max_steps)
    start, end = max(warmup - 1, 0), max_steps - 1

    def factor(step: int) -> float:
        return (step + 1) / warmup if step < warmup else shape(step, start, end)

    return factor


def _progress(step: int, start: int, end: int) -> float:
    """Share of the way from `start` to `end` that lies behind `step`, from 0 to 1."""
    return min(max((step - start) / (end - start), 0.0), 1.0) if end > start else float(step > start)
