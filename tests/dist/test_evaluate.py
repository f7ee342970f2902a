"""Evaluation gives the same numbers under every layout, whatever the number of samples, and touches the whole split."""

from __future__ import annotations

import pytest
from helpers.fitting import fit_here
from helpers.ranks import run_ranks

pytestmark = pytest.mark.dist

BASE = ["train.max_steps=1", "train.global_batch_size=8", "train.micro_batch_size=2"]


def evaluate(tmp_path, overrides, world_size):
    results = run_ranks(fit_here, world_size, overrides=[*BASE, *overrides], run_dir=str(tmp_path))
    assert all(result == results[0] for result in results)
    return results[0]["evaluation"]


@pytest.mark.parametrize("samples", [1, 7, 1000])
@pytest.mark.parametrize("pack", ["stream", "documents"])
def test_the_layout_does_not_matter(tmp_path, samples, pack):
    base = [f"train.eval_samples={samples}", f"data.pack={pack}"]
    alone = evaluate(tmp_path / "alone", [*base, "zero=z0"], 1)
    assert set(alone) == {"loss", "perplexity"}
    for number, (stage, dp) in enumerate([(1, 2), (3, 4)]):
        other = evaluate(tmp_path / f"other{number}", [*base, f"zero=z{stage}"], dp)
        assert other == pytest.approx(alone, rel=1e-5)
