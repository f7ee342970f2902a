from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyshard.configs.errors import DataError
from anyshard.trainer.data.order import SampleOrder, mix64

sizes = st.integers(1, 3000)
seeds = st.integers(0, 2**63)
epochs = st.one_of(st.integers(0, 5), st.integers(0, 10**12 // 3000))


@given(sizes, seeds, epochs)
def test_every_epoch_is_a_permutation(num_samples: int, seed: int, epoch: int) -> None:
    indices = SampleOrder(num_samples, seed).indices(epoch * num_samples, num_samples)
    assert indices.dtype == np.int64
    assert np.array_equal(np.sort(indices), np.arange(num_samples))


@given(st.integers(1, 10**9), seeds, st.integers(0, 10**12), st.lists(st.integers(0, 40), min_size=1, max_size=5))
def test_order_does_not_depend_on_how_it_is_sliced(num_samples: int, seed: int, start: int, counts: list[int]) -> None:
    order = SampleOrder(num_samples, seed)
    whole = order.indices(start, sum(counts))
    starts = start + np.cumsum([0, *counts[:-1]])
    pieces = [order.indices(int(first), count) for first, count in zip(starts, counts, strict=True)]
    assert np.array_equal(whole, np.concatenate(pieces))
    assert ((whole >= 0) & (whole < num_samples)).all()


@given(st.integers(1, 10**9), seeds, st.lists(st.integers(0, 10**12), min_size=1, max_size=20))
def test_scattered_positions_are_the_same_samples(num_samples: int, seed: int, positions: list[int]) -> None:
    order = SampleOrder(num_samples, seed)
    assert order.at(np.array(positions)).tolist() == [int(order.indices(p, 1)[0]) for p in positions]


@given(st.integers(50, 3000), seeds, st.integers(0, 10**8))
def test_epochs_and_seeds_differ(num_samples: int, seed: int, epoch: int) -> None:
    order = SampleOrder(num_samples, seed)
    here = order.indices(epoch * num_samples, num_samples)
    assert not np.array_equal(here, order.indices((epoch + 1) * num_samples, num_samples))
    assert not np.array_equal(here, SampleOrder(num_samples, seed + 1).indices(epoch * num_samples, num_samples))


@given(sizes, seeds, st.integers(0, 10**12))
def test_without_shuffle_it_counts(num_samples: int, seed: int, start: int) -> None:
    indices = SampleOrder(num_samples, seed, shuffle=False).indices(start, 50)
    assert np.array_equal(indices, np.arange(start, start + 50) % num_samples)


def test_all_permutations_of_four_are_about_equally_frequent() -> None:
    order = SampleOrder(4, seed=7)
    _, counts = np.unique(order.indices(0, 4 * 24_000).reshape(-1, 4), axis=0, return_counts=True)
    assert len(counts) == 24
    chi_square = float(((counts - 1000) ** 2 / 1000).sum())
    assert chi_square < 60  # 23 degrees of freedom: more has a probability of 4e-5


def test_neighbours_are_scattered() -> None:
    indices = SampleOrder(100_000, seed=0).indices(0, 100_000)
    correlation = np.corrcoef(indices[:-1], indices[1:])[0, 1]
    assert abs(correlation) < 0.02
    assert abs(np.corrcoef(indices, np.arange(100_000))[0, 1]) < 0.02


def test_order_never_changes() -> None:
    # a run that resumes after an upgrade must see the samples it would have seen: these numbers are part of the format
    assert SampleOrder(1000, 42).indices(0, 6).tolist() == [631, 305, 836, 918, 976, 897]
    assert SampleOrder(1000, 42).indices(10**12, 6).tolist() == [203, 212, 671, 715, 504, 25]


def test_mix64_is_splitmix64() -> None:
    # first output of the reference implementation for seed 1234567
    assert mix64(np.array([1234567], dtype=np.uint64)).tolist() == [6457827717110365317]


def test_no_samples() -> None:
    with pytest.raises(DataError, match="no samples"):
        SampleOrder(0, seed=1)
