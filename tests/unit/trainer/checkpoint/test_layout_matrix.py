"""Any layout reads what any other wrote, bit for bit: every ordered pair of 26 layouts, through the real files."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import Values
from helpers.layouts import MODEL, Layout, live, pieces, save, values
from helpers.sampling import seed, some

from anyshard.trainer.checkpoint.boxes import box_numel
from anyshard.trainer.checkpoint.catalog import index_chunks, read_commit, read_manifests, verify
from anyshard.trainer.checkpoint.reader import read_into

LAYOUTS = [
    *(Layout(dp, zero=zero) for dp, zero in product((1, 3, 8), (0, 1, 2, 3))),
    *(Layout(2, tp=tp, zero=zero) for tp, zero in product((2, 3, 4), (1, 3))),
    *(Layout(dp, pp=pp, zero=1) for dp, pp in ((1, 2), (2, 3), (3, 4))),
    *(Layout(dp, tp, pp, zero) for dp, tp, pp, zero in ((2, 2, 2, 0), (3, 2, 2, 1), (2, 4, 4, 1), (1, 3, 2, 0), (5, 1, 1, 2))),
]
PAIRS = list(product(LAYOUTS, LAYOUTS))
IN_CI = 40


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, Path]:
    """A checkpoint for each layout, made when it is first wanted."""
    return {}


def _round_trip(source: Layout, target: Layout, saved: dict[Layout, Path], folder: Path) -> None:
    state = values(seed())
    if source not in saved:
        saved[source] = save(source, state, folder / str(source))
    path = saved[source]
    index = index_chunks(read_manifests(path, read_commit(path)))
    for rank in range(target.world_size):
        wanted, found = live(target, rank, state), live(target, rank, None)
        read_into(path, found, index, verify=True)
        for one, two in zip(wanted, found, strict=True):
            assert torch.equal(one.view, two.view), (rank, one.tensor, one.box)


@pytest.mark.parametrize(("source", "target"), some(PAIRS, IN_CI), ids=str)
def test_pairs_of_today(source: Layout, target: Layout, saved: dict[Layout, Path], tmp_path: Path) -> None:
    _round_trip(source, target, saved, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("source", LAYOUTS, ids=str)
def test_every_pair(source: Layout, saved: dict[Layout, Path], tmp_path: Path) -> None:
    for target in LAYOUTS:
        _round_trip(source, target, saved, tmp_path)


@pytest.mark.parametrize("layout", some(LAYOUTS, 8), ids=str)
def test_nothing_is_written_twice(layout: Layout, tmp_path: Path) -> None:
    state: Values = values(0)
    path = save(layout, state, tmp_path)
    manifests = read_manifests(path, read_commit(path))
    stored = sum(chunk.numel for manifest in manifests for chunk in manifest.chunks)
    assert stored == sum(value.numel() for value in state.values())
    assert verify(path) == []


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_simulated_ranks_hold_the_whole_model(layout: Layout) -> None:
    """The simulation itself: together the ranks hold every element, and under ZeRO each no more than its part."""
    held: dict[str, set[tuple[object, int, int]]] = {}
    for rank in range(layout.world_size):
        for name, box, start, numel in pieces(layout, rank):
            held.setdefault(name, set()).add((box, start, numel))
    for name, param in MODEL.items():
        assert sum(numel for _, _, numel in held[name]) == math.prod(param.shape)
        if layout.zero == 3:
            assert all(numel <= -(-box_numel(box) // layout.dp) for box, _, numel in held[name])  # type: ignore[arg-type]


def test_there_are_enough_layouts() -> None:
    assert len(set(LAYOUTS)) >= 24
