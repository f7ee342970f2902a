"""A run that is preempted again and again, and given fewer or more ranks each time, is the run that nobody disturbed."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.cli import happened
from helpers.fitting import curve, records, train

pytestmark = pytest.mark.dist

# 24 sequences: 1, 2, 3, 4 ranks divide them
RUN = ["train.global_batch_size=24", "train.micro_batch_size=2", "train.max_steps=20", "precision=fp32", "zero=z1"]


def shrunk_and_grown(folder: Path, plan: list[tuple[int, int]], *more: str) -> tuple[list[float], Path]:
    """The losses of a run stopped at these steps, on so many ranks each time."""
    run = folder / "disturbed"
    for world_size, until in plan:
        train(run, [*RUN, *more, f"stop.at_step={until}"] if until < 20 else [*RUN, *more], world_size)
    return [record["train/loss"] for record in records(run)], run


@pytest.mark.parametrize("plan", [[(4, 5), (2, 10), (3, 15), (4, 20)]], ids=["4-2-3-4"])
def test_the_loss_curve_of_a_run_that_shrank_and_grew(tmp_path, plan):
    undisturbed = curve(tmp_path / "undisturbed", RUN, 2)
    losses, run = shrunk_and_grown(tmp_path, plan)
    assert losses == pytest.approx(undisturbed, rel=1e-5)
    assert [event["world_size"] for event in happened(run, "start")] == [world_size for world_size, _ in plan]
    # each sample once: the position in the sample order grows by one global batch a step, without a gap or a repetition
    assert [record["step"] for record in records(run)] == list(range(1, 21))
    tokens = [record["tokens"] for record in records(run)]
    assert tokens == [24 * 64 * step for step in range(1, 21)]
    assert [event["step"] for event in happened(run, "restore")] == [5, 10, 15]
