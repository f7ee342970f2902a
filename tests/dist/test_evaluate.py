"""Evaluation gives the same numbers under every layout, whatever the number of samples, and touches the whole split."""

from __future__ import annotations

import json

import pytest
from helpers.fitting import fit_here, train
from helpers.ranks import run_ranks

pytestmark = pytest.mark.dist

BASE = ["train.max_steps=1", "train.global_batch_size=8", "train.micro_batch_size=2"]


def evaluate(tmp_path, overrides, world_size):
    results = run_ranks(fit_here, world_size, overrides=[*BASE, *overrides], run_dir=str(tmp_path))
    assert all(result == results[0] for result in results)
    return results[0]["evaluation"]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("samples", [1, 7, 1000])
@pytest.mark.parametrize("pack", ["stream", "documents"])
def test_the_layout_does_not_matter(tmp_path, samples, pack):
    base = [f"train.eval_samples={samples}", f"data.pack={pack}"]
    alone = evaluate(tmp_path / "alone", [*base, "zero=z0"], 1)
    assert set(alone) == {"loss", "perplexity"}
    for number, (stage, dp) in enumerate([(1, 2), (3, 4)]):
        other = evaluate(tmp_path / f"other{number}", [*base, f"zero=z{stage}"], dp)
        assert other == pytest.approx(alone, rel=1e-5)


def test_the_best_checkpoint_stays(tmp_path):
    """The highest loss, which is an early one, so that it cannot be the newest checkpoint."""
    from anyshard.trainer.checkpoint.catalog import list_checkpoints, read_commit

    overrides = [
        "train.eval_samples=8",
        "train.eval_every_steps=2",
        "train.max_steps=12",
        "checkpoint.every_steps=2",
        "checkpoint.at_end=true",
        "checkpoint.keep=1",
        "checkpoint.best_metric=loss",
        "checkpoint.best_is=highest",
    ]
    train(tmp_path / "run", overrides, 2)
    evaluations = {
        record["step"]: record["eval/loss"]
        for record in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
        if "eval/loss" in record
    }
    found = list_checkpoints(tmp_path / "run" / "checkpoints")
    best = max(evaluations, key=evaluations.__getitem__)
    assert best < 12
    assert [each.step for each in found] == sorted({12, best}, reverse=True)
    assert {each.step: read_commit(each.path).meta["evaluation"]["loss"] for each in found} == {
        step: evaluations[step] for step in {12, best}
    }
