"""Evaluation: the mean loss over samples spread evenly over the validation data, the same ones under every layout."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from anyshard.parallel.groups import Groups
from anyshard.trainer.engine import sum_over_data
from anyshard.trainer.task import Task


def spread(count: int, length: int) -> list[int]:
    """`count` indices spread evenly over `length`; all of them where there are not as many."""
    count = min(count, length)
    return [number * length // count for number in range(count)]


def evaluate(
    model: Any,
    task: Task,
    *,
    samples: int,
    micro_batch_size: int,
    device: torch.device,
    groups: Groups,
    on_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Loss (and what `task.predict` reports) averaged over `samples` validation samples.

    Every rank runs the same number of forward passes, as ZeRO-3 needs; a rank that has run out of samples takes the
    first one with weight 0.

    Args:
        on_batch: called after each forward pass.

    Collective: every rank calls it; it blocks.
    """
    dp_rank, dp = groups.dp_rank, groups.mesh.dp
    data = task.validation_data
    chosen = spread(samples, len(data))
    mine = chosen[dp_rank::dp]
    rounds = math.ceil(math.ceil(len(chosen) / dp) / micro_batch_size)
    sums: dict[str, torch.Tensor] = {}
    model.eval()
    with torch.no_grad():
        for number in range(rounds):
            indices = mine[number * micro_batch_size : (number + 1) * micro_batch_size]
            batch = task.collate([data[i] for i in indices or [0]])
            batch = {name: value.to(device) for name, value in batch.items()}
            numbers = {"loss": task.loss(model, batch)}
            if task.predict is not None:
                numbers |= task.predict(model, batch)
            targets = task.num_targets(batch) if task.num_targets is not None else torch.tensor(len(indices))
            weight = targets.double().cpu() if indices else torch.zeros((), dtype=torch.float64)
            for name, value in numbers.items():
                sums[name] = sums.get(name, torch.zeros(2, dtype=torch.float64)) + torch.stack(
                    [value.detach().double().cpu() * weight, weight]
                )
            on_batch()
    model.train()
    names = sorted(sums)
    totals = sum_over_data(torch.stack([sums[name] for name in names]).to(device), groups)
    means = {name: float(total[0] / total[1]) for name, total in zip(names, totals, strict=True)}
    if task.perplexity:
        means["perplexity"] = math.exp(min(means["loss"], 700.0))  # exp overflows a double above 709
    return means
