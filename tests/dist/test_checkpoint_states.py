"""Optimizers that keep 8-bit codes and scales of blocks, or rows and columns: saved and restored by real engines."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from helpers.checkpoint_engines import FAMILIES, Layout, engine_of, logical_state, manager, model_digest, scrambled, train
from helpers.ranks import run_ranks

from anyshard.trainer.checkpoint.catalog import verify

pytestmark = pytest.mark.dist

STEPS = 3
MORE = 3
EIGHT_BIT = {"optimizer": "adam8bit"}
FACTORED = {"optimizer": "factored"}
SAME = [
    Layout(2, 0, **EIGHT_BIT),
    Layout(2, 1, **EIGHT_BIT),
    Layout(2, 3, sub_group=1500, **EIGHT_BIT),
    Layout(1, 0, tp=2, **EIGHT_BIT),
    Layout(1, 1, tp=2, **EIGHT_BIT),
    Layout(2, 0, **FACTORED),
    Layout(2, 1, **FACTORED),
    Layout(1, 0, tp=2, **FACTORED),
    Layout(2, 2, offload=True, **FACTORED),
]
OTHER = [
    (Layout(2, 1, **EIGHT_BIT), Layout(2, 3, **EIGHT_BIT)),
    (Layout(2, 0, **EIGHT_BIT), Layout(2, 1, **EIGHT_BIT)),
    (Layout(2, 3, **EIGHT_BIT), Layout(1, 0, **EIGHT_BIT)),
    (Layout(1, 0, tp=2, **EIGHT_BIT), Layout(2, 0, **EIGHT_BIT)),
    (Layout(2, 0, **FACTORED), Layout(2, 1, **FACTORED)),
]
EXACT = [  # every state has one element for each of its parameter, or the parameter is whole in both
    (Layout(2, 0, **EIGHT_BIT), Layout(1, 0, **EIGHT_BIT)),
    (Layout(1, 0, **FACTORED), Layout(2, 0, **FACTORED)),
    (Layout(2, 1, **FACTORED), Layout(2, 3, **FACTORED)),
    (Layout(2, 2, **EIGHT_BIT), Layout(2, 1, **EIGHT_BIT)),
]


def save_then_train(layout: Layout, directory: str) -> dict[str, Any]:
    with engine_of(layout) as engine:
        train(engine, 0, STEPS)
        result = manager(Path(directory)).save(engine, step=STEPS, meta={}, rank_meta={})
        found = {"state": logical_state(engine), "model": model_digest(engine), "path": str(result.path)}
        return found | {"losses": train(engine, STEPS, MORE), "after": logical_state(engine)}


def restore_then_train(layout: Layout, path: str) -> dict[str, Any]:
    with engine_of(layout, scrambled(FAMILIES[layout.model]())) as engine:
        restored = manager(Path(path).parent).restore(engine, Path(path))
        found = {"state": logical_state(engine), "model": model_digest(engine), "notes": restored.notes}
        found["losses"] = train(engine, STEPS, MORE)
        return found if restored.notes else found | {"after": logical_state(engine)}


def both(source: Layout, target: Layout, directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    before = run_ranks(save_then_train, source.ranks, layout=source, directory=str(directory))[0]
    assert verify(Path(before["path"])) == []
    return before, run_ranks(restore_then_train, target.ranks, layout=target, path=before["path"])[0]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("layout", SAME, ids=str)
def test_the_same_layout_goes_on_bit_for_bit(layout: Layout, tmp_path: Path) -> None:
    before, after = both(layout, layout, tmp_path)
    assert after["notes"] == []
    assert after["state"] == before["state"]
    assert after["losses"] == before["losses"]
    assert after["after"] == before["after"]


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("source", "target"), EXACT, ids=str)
def test_what_can_follow_follows(source: Layout, target: Layout, tmp_path: Path) -> None:
    before, after = both(source, target, tmp_path)
    assert [note for note in after["notes"] if not note.startswith("rms of")] == []
    assert {name: value for name, value in after["state"].items() if not name.startswith("@")} == {
        name: value for name, value in before["state"].items() if not name.startswith("@")
    }
    assert all(math.isclose(a, b, rel_tol=2e-2) for a, b in zip(after["losses"], before["losses"], strict=True))


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("source", "target"), OTHER, ids=str)
def test_another_layout_restores_the_parameters_and_names_what_starts_afresh(
    source: Layout, target: Layout, tmp_path: Path
) -> None:
    before, after = both(source, target, tmp_path)
    (note,) = (note for note in after["notes"] if not note.startswith("rms of"))
    assert "starts afresh" in note
    assert "model." in note
    assert after["model"] == before["model"]
    assert all(math.isfinite(loss) for loss in after["losses"])
    assert math.isclose(after["losses"][0], before["losses"][0], rel_tol=1e-4), "the first loss is of the same weights"
