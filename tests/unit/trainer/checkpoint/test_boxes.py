import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyshard.trainer.checkpoint.boxes import box_numel, full_box, runs, share, split, uncovered


@st.composite
def piece(draw, shape):
    """A box of the tensor and a flat interval inside it."""
    box = []
    for size in shape:
        start = draw(st.integers(0, size - 1))
        box.append((start, draw(st.integers(start + 1, size))))
    total = box_numel(tuple(box))
    start = draw(st.integers(0, total - 1))
    return tuple(box), (start, draw(st.integers(1, total - start)))


@st.composite
def two_pieces(draw):
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    return draw(piece(shape)), draw(piece(shape)), shape


def elements(box, interval, shape):
    """Brute force: global flat index of each element of the piece, in its own order."""
    index = np.arange(math.prod(shape)).reshape(shape)[tuple(slice(a, b) for a, b in box)].reshape(-1)
    return index[interval[0] : interval[0] + interval[1]]


@given(two_pieces())
def test_runs_equal_brute_force(pieces):
    (source_box, source), (target_box, target), shape = pieces
    here, there = elements(source_box, source, shape), elements(target_box, target, shape)
    filled = np.full(len(there), -1)
    for a, b, numel in runs(source_box, source, target_box, target):
        assert np.all(filled[b : b + numel] == -1), "an element was moved twice"
        filled[b : b + numel] = here[a : a + numel]
    wanted = np.where(np.isin(there, here), there, -1)
    assert np.array_equal(filled, wanted)


def test_runs_of_a_scalar():
    assert runs((), (0, 1), (), (0, 1)).tolist() == [[0, 0, 1]]


def test_runs_merges_whole_trailing_dims():
    box = full_box((4, 3, 5))
    half = ((2, 4), (0, 3), (0, 5))
    assert runs(box, (0, 60), half, (0, 30)).tolist() == [[30, 0, 30]]


@given(st.lists(st.integers(0, 40), max_size=8), st.integers(1, 6))
def test_shares_cover_everything_once_and_are_balanced(lengths, world_size):
    shares = [share(lengths, rank, world_size) for rank in range(world_size)]
    for index, length in enumerate(lengths):
        mine = [(start, numel) for i, start, numel in itertools.chain(*shares) if i == index]
        assert uncovered(mine, length) is None
    sizes = [sum(numel for *_, numel in part) for part in shares]
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(0, 100), st.integers(0, 200), st.integers(1, 50))
def test_split_keeps_order_and_limit(start, numel, limit):
    pieces = split(start, numel, limit)
    assert [i for a, n in pieces for i in range(a, a + n)] == list(range(start, start + numel))
    assert all(n <= limit for _, n in pieces)


@given(st.lists(st.tuples(st.integers(-2, 12), st.integers(1, 6)), max_size=5), st.integers(1, 12))
def test_uncovered_finds_every_defect(pieces, length):
    counts = np.zeros(length, dtype=int)
    outside = any(start < 0 or start + numel > length for start, numel in pieces)
    for start, numel in pieces:
        counts[max(0, start) : max(0, start + numel)] += 1
    assert (uncovered(pieces, length) is None) == (not outside and bool(np.all(counts == 1)))


@pytest.mark.parametrize(
    ("pieces", "found"),
    [
        ([(0, 4), (6, 4)], (4, 6, "missing")),
        ([(0, 6), (4, 6)], (4, 6, "twice")),
        ([(0, 11)], (0, 11, "outside")),
        ([(0, 9)], (9, 10, "missing")),
    ],
)
def test_uncovered_says_where(pieces, found):
    assert uncovered(pieces, 10) == found
