from __future__ import annotations

import threading
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from helpers.sampling import seed

from anyshard.trainer.batch import BatchPlan
from anyshard.trainer.data.loader import Loader, collate_tokens
from anyshard.trainer.data.order import SampleOrder
from anyshard.trainer.data.tokens import TokenDataset


class Numbers:
    """A user's dataset: sample i is the number i."""

    def __init__(self, size: int, fail_at: int | None = None) -> None:
        self.size, self.fail_at = size, fail_at
        self.threads: set[str] = set()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        self.threads.add(threading.current_thread().name)
        if index == self.fail_at:
            raise RuntimeError(f"sample {index} is broken")
        return index


def collate(samples: list[int]) -> dict[str, torch.Tensor]:
    return {"numbers": torch.tensor(samples)}


def plan(dp: int, micro: int = 2, accumulation: int = 3) -> BatchPlan:
    return BatchPlan(dp * micro * accumulation, micro, accumulation, dp)


def loader(
    data: Any, batch: BatchPlan, dp_rank: int = 0, *, prefetch: bool = True, shuffle: bool = True, collate: Any = collate
) -> Loader:
    order = SampleOrder(len(data), seed=5, shuffle=shuffle)
    return Loader(data, collate=collate, order=order, batch=batch, dp_rank=dp_rank, device="cpu", prefetch=prefetch)


def test_position_of_each_sample() -> None:
    batch = plan(dp=2)
    got = [[b["numbers"].tolist() for b in loader(Numbers(100), batch, rank, shuffle=False).step(12)] for rank in (0, 1)]
    assert got == [[[12, 13], [16, 17], [20, 21]], [[14, 15], [18, 19], [22, 23]]]


@pytest.mark.parametrize("dp", [1, 2, 3, 6])
def test_every_layout_sees_the_same_global_batch(dp: int) -> None:
    batch = BatchPlan(12, 2, 6 // dp, dp)
    steps = [loader(Numbers(40), batch, rank).step(36) for rank in range(dp)]
    order = SampleOrder(40, seed=5).indices(36, 12).tolist()
    seen = [n for j in range(batch.accumulation_steps) for rank in range(dp) for n in steps[rank][j]["numbers"].tolist()]
    assert seen == order


@pytest.mark.parametrize("number", range(50))
def test_every_sample_once_an_epoch_through_crashes_and_resizes(number: int) -> None:
    """A run of several lives: each has its own dp and micro batch, goes back to the last save, and ends anywhere."""
    random = Random(1000 * seed() + number)
    num_samples, global_batch_size = random.randint(5, 60), random.choice([4, 6, 12])
    num_steps = 2 * num_samples // global_batch_size + 1
    cuts = [(micro, dp) for micro in (1, 2, 3) for dp in (1, 2, 3, 4) if global_batch_size % (micro * dp) == 0]
    seen: list[list[int]] = []  # the global batches that became part of the model
    saved = 0
    while len(seen) < num_steps:
        micro, dp = random.choice(cuts)
        batch = BatchPlan(global_batch_size, micro, global_batch_size // (micro * dp), dp)
        loaders = [loader(Numbers(num_samples), batch, rank, prefetch=False) for rank in range(dp)]
        del seen[saved:]
        for _ in range(random.randint(1, 6)):
            steps = [each.step(len(seen) * global_batch_size) for each in loaders]
            seen.append([n for j in range(batch.accumulation_steps) for step in steps for n in step[j]["numbers"].tolist()])
            saved = random.choice([saved, len(seen)])
    flat = [number for step in seen for number in step]
    for epoch in range(len(flat) // num_samples):
        assert sorted(flat[epoch * num_samples : (epoch + 1) * num_samples]) == list(range(num_samples))


@pytest.mark.parametrize("prefetch", [False, True])
def test_any_position_any_time(prefetch: bool) -> None:
    batch = plan(dp=1)
    here = loader(Numbers(50), batch, prefetch=prefetch)
    order = SampleOrder(50, seed=5)
    for position in (0, 6, 12, 6, 6 * 10**11, 18, 24):
        got = [n for b in here.step(position) for n in b["numbers"].tolist()]
        assert got == order.indices(position, 6).tolist()
    here.close()
    assert [n for b in here.step(30) for n in b["numbers"].tolist()] == order.indices(30, 6).tolist()


def test_next_batch_is_made_in_the_background() -> None:
    data = Numbers(1000)
    here = loader(data, plan(dp=1))
    here.step(0)
    here.step(6)
    here.close()
    assert any(name.startswith("anyshard-loader") for name in data.threads)
    assert not any(thread.name.startswith("anyshard-loader") for thread in threading.enumerate())


def test_without_prefetch_there_is_no_thread() -> None:
    data = Numbers(1000)
    here = loader(data, plan(dp=1), prefetch=False)
    here.step(0)
    here.step(6)
    here.close()
    assert data.threads == {threading.current_thread().name}


def test_an_error_of_the_dataset_comes_out_at_its_step() -> None:
    here = loader(Numbers(100, fail_at=7), plan(dp=1), shuffle=False)
    here.step(0)  # the batch after this one fails in the background
    with pytest.raises(RuntimeError, match="sample 7 is broken"):
        here.step(6)
    assert here.step(12)[0]["numbers"].tolist() == [12, 13]
    here.close()


def test_small_batches_are_made_many_at_a_time_and_an_error_still_comes_out_at_its_step() -> None:
    data = Numbers(100, fail_at=21)
    here = loader(data, plan(dp=1, micro=1, accumulation=2), shuffle=False)
    for position in range(0, 20, 2):  # the thread fails at position 20 long before that is asked for
        assert [b["numbers"].tolist() for b in here.step(position)] == [[position], [position + 1]]
    with pytest.raises(RuntimeError, match="sample 21 is broken"):
        here.step(20)
    assert [b["numbers"].tolist() for b in here.step(22)] == [[22], [23]]
    here.close()


@pytest.mark.parametrize("separate", [False, True])
def test_gathering_equals_collating(separate: bool) -> None:
    data = TokenDataset(
        np.arange(1000, dtype=np.uint16), np.arange(7, 1001, 7), sequence_length=16, separate_documents=separate
    )

    def one_by_one(samples: list[Any]) -> dict[str, torch.Tensor]:
        return collate_tokens(samples)

    fast = loader(data, plan(dp=2), 1, collate=collate_tokens).step(24)
    slow = loader(data, plan(dp=2), 1, collate=one_by_one).step(24)
    assert len(fast) == 3
    for a, b in zip(fast, slow, strict=True):
        assert a.keys() == b.keys() == {"input_ids", "labels"} | ({"position_ids"} if separate else set())
        for name in a:
            assert torch.equal(a[name], b[name])
            assert a[name].dtype == torch.int64
            assert a[name].is_contiguous()


def test_collate_stacks() -> None:
    samples = [{"x": np.array([1, 2]), "y": np.array([0.5])}, {"x": np.array([3, 4]), "y": np.array([1.5])}]
    batch = collate_tokens(samples)
    assert batch["x"].tolist() == [[1, 2], [3, 4]]
    assert batch["y"].dtype == torch.float64
