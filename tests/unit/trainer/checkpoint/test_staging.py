import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyshard.trainer.checkpoint.staging import MIN_BLOCKS, Block, StagingPool, blocks_for, free_host_bytes, max_blocks

BLOCK = 8192


def never() -> bool:
    return False


def test_blocks_are_aligned_and_one_memory() -> None:
    block = Block(BLOCK)
    assert block.address % 4096 == 0
    assert bytes(block.data) == bytes(BLOCK)
    block.tensor[3] = 7
    assert block.data[3] == 7
    block.touch()
    assert block.data[3] == 0


def test_blocks_are_used_again() -> None:
    pool = StagingPool(2, block_bytes=BLOCK)
    first, second = pool.acquire(never), pool.acquire(never)
    assert first is not second
    assert first is not None
    pool.release(first)
    assert pool.acquire(never) is first
    assert pool.num_bytes == 2 * BLOCK


def test_a_full_pool_waits_for_a_block_or_for_the_end() -> None:
    pool = StagingPool(1, block_bytes=BLOCK)
    block = pool.acquire(never)
    assert block is not None
    given_up, got = threading.Event(), []
    waiting = [threading.Thread(target=lambda: got.append(pool.acquire(given_up.is_set))) for _ in range(2)]
    for thread in waiting:
        thread.start()
    time.sleep(0.05)
    assert got == []
    pool.release(block)
    deadline = time.monotonic() + 5
    while not got and time.monotonic() < deadline:
        time.sleep(0.005)
    assert got == [block]
    given_up.set()
    pool.wake()
    for thread in waiting:
        thread.join(5)
    assert got == [block, None]


@pytest.mark.parametrize(("asked", "made"), [(0, 0), (2, 2), (9, 3)])
def test_memory_is_made_ahead_up_to_the_bound(asked: int, made: int) -> None:
    pool = StagingPool(3, block_bytes=BLOCK)
    pool.prepare(asked)
    assert pool.num_bytes == made * BLOCK
    pool.prepare(asked)
    assert pool.num_bytes == made * BLOCK


@given(st.integers(0, 10**6), st.none() | st.integers(1, 10**6), st.integers(0, 10**7))
def test_bound_of_the_memory(snapshot_bytes: int, staging_bytes: int | None, free_bytes: int) -> None:
    number = max_blocks(snapshot_bytes, staging_bytes, free_bytes=free_bytes, block_bytes=BLOCK)
    bound = free_bytes // 4 if staging_bytes is None else staging_bytes
    assert number >= MIN_BLOCKS
    assert number == MIN_BLOCKS or number * BLOCK <= bound
    assert number <= max(MIN_BLOCKS, 2 * blocks_for(snapshot_bytes, BLOCK))
    if bound > 2 * snapshot_bytes + 2 * BLOCK:
        assert number * BLOCK >= 2 * snapshot_bytes


def test_free_memory_is_shared_by_the_ranks_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    whole = free_host_bytes()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert 0 < free_host_bytes() < whole / 2
