"""Batch arithmetic: global = micro * accumulation * dp, in sequences. This is the only place that divides batches.

The user gives the global and the micro batch size; accumulation is derived from dp. Pure; used by the rules, the plan,
the data loader and the compiler of the DeepSpeed configuration.
"""

from __future__ import annotations

from dataclasses import dataclass

from anyshard.configs.errors import PlanError, Problem
from anyshard.configs.schema import Train


@dataclass(frozen=True)
class BatchPlan:
    """How one optimizer step is divided over ranks and micro-steps; all sizes in sequences.

    The sample at position `j * (dp * micro_batch_size) + dp_rank * micro_batch_size + k` of the global batch goes to
    data-parallel rank `dp_rank` in micro-step `j`.
    """

    global_batch_size: int
    micro_batch_size: int
    accumulation_steps: int
    dp: int

    def __str__(self) -> str:
        parts = f"{self.micro_batch_size} micro x {self.accumulation_steps} accumulation x {self.dp} dp"
        return f"{self.global_batch_size} sequences = {parts}"


def batch_problem(train: Train, dp: int) -> Problem | None:
    """Why the global batch cannot be divided over `dp` ranks, with the nearest values that can; None when it can."""
    unit = train.micro_batch_size * dp
    whole, rest = divmod(train.global_batch_size, unit)
    if rest == 0:
        return None
    near = [unit * (whole + 1)] if whole == 0 else [unit * whole, unit * (whole + 1)]
    fix = f"Use train.global_batch_size={' or '.join(map(str, near))}"
    per_rank, uneven = divmod(train.global_batch_size, dp)
    if not uneven:
        divisors = [n for n in range(1, per_rank + 1) if per_rank % n == 0]
        micro = min(divisors, key=lambda n: (abs(n - train.micro_batch_size), n))
        fix += f", or train.micro_batch_size={micro}"
    return Problem(
        "train.global_batch_size",
        train.global_batch_size,
        f"it is not a multiple of train.micro_batch_size * dp = {train.micro_batch_size} * {dp} = {unit}.",
        fix + ".",
    )


def plan_batch(train: Train, dp: int) -> BatchPlan:
    """Divide the global batch over `dp` ranks.

    Raises:
        PlanError: it cannot be divided; names the nearest values that can.
    """
    if problem := batch_problem(train, dp):
        raise PlanError(problem)
    accumulation_steps = train.global_batch_size // (train.micro_batch_size * dp)
    return BatchPlan(train.global_batch_size, train.micro_batch_size, accumulation_steps, dp)
