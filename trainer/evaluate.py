"""Evaluation: the mean loss over samples spread evenly over the validation data, the same ones under every layout."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from anyshard.trainer.engine import Engine, sum_over_data
from anyshard.trainer.task import Batch, Task

_AT_ONCE = 16
"""Batches of an evaluation that are made before they are run."""


def spread(count: int, length: int) -> list[int]:
    """`count` indices spread evenly over `length`; all of them where there are not as many."""
    count = min(count, length)
    return [number * length // count for number in range(count)]


def evaluate(
    engine: Engine,
    task: Task,
    *,
    samples: int,
    micro_batch_size: int,
    device: torch.device,
    on_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Loss (and what `task.predict` reports) averaged over `samples` validation samples.

    Every rank runs the same number of forward passes, as ZeRO-3 needs; a rank that has run out of samples takes the
    first one with weight 0.

    Args:
        on_batch: called after each forward pass; where it raises, on every rank, the model is left in evaluation mode.

    Collective: every rank calls it; it blocks.
    """
    groups = engine.groups
    dp_rank, dp = groups.dp_rank, groups.mesh.dp
    data = task.validation_data
    chosen = spread(samples, len(data))
    mine = chosen[dp_rank::dp]
    rounds = math.ceil(math.ceil(len(chosen) / dp) / micro_batch_size)

    def batch_of(number: int) -> tuple[Batch, torch.Tensor]:
        indices = mine[number * micro_batch_size : (number + 1) * micro_batch_size]
        batch = {name: value.to(device) for name, value in task.collate([data[i] for i in indices or [0]]).items()}
        targets = task.num_targets(batch) if task.num_targets is not None else torch.tensor(len(indices))
        return batch, targets.double().cpu() if indices else torch.zeros((), dtype=torch.float64)

    def numbers_of(model: Any, batch: Batch) -> dict[str, torch.Tensor]:
        numbers = {"loss": task.loss(model, batch)}
        return numbers if task.predict is None else numbers | task.predict(model, batch)

    sums: dict[str, torch.Tensor] = {}
    # of all rounds but the last, which may be smaller, a few at once: the stages of a pipeline then work side by side
    for numbers in [*_runs(rounds - 1), [rounds - 1]]:
        batches = [batch_of(number) for number in numbers]
        measured = engine.measure([batch for batch, _ in batches], numbers_of, on_batch)
        for (_, weight), values in zip(batches, measured, strict=False):
            for name, value in values.items():
                sums[name] = sums.get(name, torch.zeros(2, dtype=torch.float64)) + torch.stack(
                    [value.detach().double().cpu() * weight, weight]
                )
    means: dict[str, float] = {}
    if sums:
        names = sorted(sums)
        totals = sum_over_data(torch.stack([sums[name] for name in names]).to(device), groups)
        means = {name: float(total[0] / total[1]) for name, total in zip(names, totals, strict=True)}
    means = engine.agree(means)
    if task.perplexity:
        means["perplexity"] = math.exp(min(means["loss"], 700.0))  # exp overflows a double above 709
    return means


def _runs(rounds: int) -> list[list[int]]:
    return [list(range(start, min(start + _AT_ONCE, rounds))) for start in range(0, rounds, _AT_ONCE)]
