"""Runs under any mesh against one process: the same losses and norms, with clipping, accumulation, decay and tied weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.fitting import train

Records = list[dict[str, Any]]
Layouts = dict[str, tuple[list[str], int]]
"""Name -> overrides and number of ranks."""

STEPS = 20
BASE = [
    f"train.max_steps={STEPS}",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",  # accumulation: 4 at dp 1, 2 at dp 2
    "train.max_grad_norm=0.8",
    "optimizer.weight_decay=0.1",
    "model.config.tie_word_embeddings=true",
]
STAGES = ["z0", "z1", "z2", "z3"]


def column(records: Records, name: str) -> list[float]:
    """One metric of every step."""
    return [record[name] for record in records]


def check(records: Records, reference: Records) -> None:
    """The run is the one of one process (the fixture `one_process`)."""
    assert len(records) == STEPS
    assert column(records, "train/loss") == pytest.approx(column(reference, "train/loss"), rel=1e-5)
    norms = column(records, "train/grad_norm")
    assert norms == pytest.approx(column(reference, "train/grad_norm"), rel=1e-4)
    assert max(norms) > 0.8  # clipping was at work


def check_resumed(folder: Path, reference: Records, layouts: Layouts, first: str, second: str) -> None:
    """Half of the run under one layout and half under another is the one of one process."""
    (options, ranks), (others, more) = layouts[first], layouts[second]
    save = "checkpoint.at_end=true"
    train(folder, [*BASE, *options, save, "stop.at_step=10"], ranks)
    check(train(folder, [*BASE, *others, save], more), reference)


def pairs(layouts: Layouts, axis: str) -> list[Any]:
    """Ordered pairs of layouts, at least one with `axis` in its name; those of more than two ranks are slow."""
    return [
        pytest.param(one, other, marks=[pytest.mark.slow] if max(layouts[one][1], layouts[other][1]) > 2 else [])
        for one in layouts
        for other in layouts
        if one != other and axis in one + other
    ]
