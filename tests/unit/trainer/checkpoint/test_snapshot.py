"""Copying without ranks: what a block holds, what a step waits for, and that nothing is lost when a save is given up."""

import contextlib
import ctypes
import threading
import time
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anyshard.trainer.checkpoint.layout import Fragment
from anyshard.trainer.checkpoint.manifest import ALIGN_BYTES, ITEM_BYTES, Tensor
from anyshard.trainer.checkpoint.snapshot import FilePlan, Snapshot, UpdateGuard, cut
from anyshard.trainer.checkpoint.staging import StagingPool

BLOCK = 8192


def fragment(value: torch.Tensor, owner: torch.Tensor | None = None, name: str = "w") -> Fragment:
    dtype = str(value.dtype).removeprefix("torch.")
    return Fragment(Tensor(name, "param", dtype, tuple(value.shape)), 0, value.view(-1), False, owner=owner)


def snapshot_of(fragments: list[Fragment], pool: StagingPool) -> Snapshot:
    return Snapshot(FilePlan.of(fragments, 4096, pool.block_bytes), pool)


def nothing() -> None:
    """Nobody wants to know."""


@given(
    st.lists(st.tuples(st.sampled_from([torch.float32, torch.bfloat16, torch.bool, torch.complex128]), st.integers(1, 5000))),
    st.sampled_from([64, 4096, BLOCK]),
)
def test_pieces_cover_everything_once_and_stay_in_their_block(kinds: list[tuple[torch.dtype, int]], chunk_bytes: int) -> None:
    fragments = [fragment(torch.empty(numel, dtype=dtype), name=str(i)) for i, (dtype, numel) in enumerate(kinds)]
    blocks, num_bytes = cut(fragments, chunk_bytes, BLOCK)
    end, reached = 0, {id(each): 0 for each in fragments}
    for number, pieces in enumerate(blocks):
        for piece in pieces:
            assert piece.offset == end, "pieces follow each other"
            assert piece.offset % ALIGN_BYTES == 0
            assert piece.nbytes == piece.numel * ITEM_BYTES[piece.fragment.tensor.dtype] <= chunk_bytes
            assert number * BLOCK <= piece.offset < piece.offset + piece.nbytes <= (number + 1) * BLOCK
            assert piece.start == reached[id(piece.fragment)]
            reached[id(piece.fragment)] += piece.numel
            end = -(-(piece.offset + piece.nbytes) // ALIGN_BYTES) * ALIGN_BYTES
    assert num_bytes == end
    assert all(reached[id(each)] == each.numel for each in fragments)


def copy_in_background(snapshot: Snapshot, copied: Callable[[], None] = nothing) -> threading.Thread:
    thread = threading.Thread(target=snapshot.copy, args=[copied])
    thread.start()
    return thread


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 4), st.booleans())
def test_blocks_hold_the_bytes_of_the_file(max_blocks: int, here: bool) -> None:
    values = [torch.randn(3000), torch.arange(7), torch.randn(5, 11).bfloat16(), torch.tensor([True, False])]
    pool = StagingPool(max_blocks, block_bytes=BLOCK)
    for _ in range(2):  # the second time the blocks hold other bytes before
        snapshot = snapshot_of([fragment(value) for value in values], pool)
        file = bytearray(b"x") * snapshot.num_bytes
        written = 0
        thread = None if here else copy_in_background(snapshot)
        for filled in snapshot.blocks_here() if here else snapshot.blocks():
            assert filled.offset == written
            written += filled.num_bytes
            file[filled.offset : written] = filled.data
            for piece in filled.pieces:
                held = torch.frombuffer(bytearray(filled.bytes_of(piece)), dtype=piece.fragment.view.dtype)
                assert torch.equal(held, piece.fragment.view[piece.start : piece.start + piece.numel])
        if thread is not None:
            thread.join(5)
        assert snapshot.is_copied
        assert written == snapshot.num_bytes
        end = 3000 * 4
        assert bytes(file[end : -(-end // ALIGN_BYTES) * ALIGN_BYTES]).strip(b"\0") == b"", "padding is zero"
        values = [torch.ones_like(value) for value in values]
    assert pool.num_bytes <= max_blocks * BLOCK


class Gate:
    """Lets copies through one by one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._passes, real = threading.Semaphore(0), ctypes.memmove

        def gated(*args: int) -> int:
            assert self._passes.acquire(timeout=10)
            return real(*args)

        monkeypatch.setattr(ctypes, "memmove", gated)

    def let(self, number: int) -> None:
        self._passes.release(number)


def test_a_step_waits_for_what_it_changes_and_for_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, guard = Gate(monkeypatch), UpdateGuard()
    first, second, frozen = (torch.nn.Parameter(torch.full((100,), float(n))) for n in range(3))
    optimizer = torch.optim.SGD([{"params": [first]}, {"params": [second]}], lr=1.0)
    pool = StagingPool(4, block_bytes=BLOCK)
    fragments = [fragment(first.detach(), first), fragment(second.detach(), second), fragment(frozen.detach())]
    snapshot = snapshot_of(fragments, pool)
    guard.protect(snapshot, [optimizer])
    thread = copy_in_background(snapshot)
    groups = optimizer.param_groups

    def step(group: int) -> threading.Thread:
        """As DeepSpeed steps one group."""
        optimizer.param_groups = [groups[group]]
        (param,) = groups[group]["params"]
        param.grad = torch.ones_like(param)
        stepping = threading.Thread(target=optimizer.step)
        stepping.start()
        stepping.join(0.1)
        return stepping

    waiting = step(0)
    assert waiting.is_alive()
    assert float(first.detach()[0]) == 0
    gate.let(1)
    waiting.join(5)
    assert float(first.detach()[0]) == -1
    waiting = step(1)
    assert waiting.is_alive(), "the second group is not copied yet"
    gate.let(1)
    waiting.join(5)
    assert not waiting.is_alive(), "the frozen parameter is not waited for"
    assert float(second.detach()[0]) == 0
    assert not snapshot.is_copied
    gate.let(1)
    held = [filled.block.tensor.clone() for filled in snapshot.blocks()]
    assert [float(block.view(torch.float32)[at]) for block in held for at in (0, 1024)] == [0, 1, 2, 0]
    thread.join(5)
    assert snapshot.is_copied
    assert guard.stall_s >= 0.15
    assert snapshot.waited_s >= 0.15
    guard.wait()
    assert step(0).is_alive() is False, "a copied snapshot holds nobody up"


def test_whoever_else_changes_the_state_can_wait_too(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, guard = Gate(monkeypatch), UpdateGuard()
    snapshot = snapshot_of([fragment(torch.ones(5))], StagingPool(1, block_bytes=BLOCK))
    guard.protect(snapshot, [])
    thread = copy_in_background(snapshot)
    waiting = threading.Thread(target=guard.wait)
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    gate.let(1)
    waiting.join(5)
    assert not waiting.is_alive()
    assert len(list(snapshot.blocks())) == 1
    thread.join(5)


def test_a_tensor_that_is_not_known_waits_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    snapshot = snapshot_of([fragment(torch.ones(5))], StagingPool(1, block_bytes=BLOCK))
    thread = copy_in_background(snapshot)
    waiting = threading.Thread(target=snapshot.wait_for, args=[[torch.ones(1)]])
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    gate.let(1)
    waiting.join(5)
    thread.join(5)
    assert not waiting.is_alive()


def test_giving_up_frees_steps_and_blocks() -> None:
    """Nobody writes, so copying stops when the pool is empty; then the save fails."""
    owner = torch.ones(8000)
    pool = StagingPool(2, block_bytes=BLOCK)
    told: list[int] = []
    snapshot = snapshot_of([fragment(owner, owner)], pool)
    copying = copy_in_background(snapshot, lambda: told.append(1))
    waiting = threading.Thread(target=snapshot.wait_for, args=[[owner]])
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    snapshot.give_up()
    for thread in (waiting, copying):
        thread.join(5)
        assert not thread.is_alive()
    assert snapshot.is_copied
    assert told == [], "it was not copied"
    assert all(pool.acquire(lambda: True) is None for _ in range(2))
    taken = [pool.acquire(lambda: False) for _ in range(2)]
    assert len({id(block) for block in taken}) == 2, "both blocks are back"


def test_a_write_that_fails_gives_its_block_back() -> None:
    pool = StagingPool(1, block_bytes=BLOCK)
    snapshot = snapshot_of([fragment(torch.ones(8000))], pool)
    copying = copy_in_background(snapshot)
    with contextlib.closing(snapshot.blocks()) as blocks:
        next(blocks)
    snapshot.give_up()
    copying.join(5)
    assert pool.acquire(lambda: False) is not None


def test_an_error_while_copying_fails_the_save(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: int) -> None:
        raise ValueError("device lost")

    monkeypatch.setattr(ctypes, "memmove", broken)
    owner = torch.ones(5)
    snapshot = snapshot_of([fragment(owner, owner)], StagingPool(1, block_bytes=BLOCK))
    copy_in_background(snapshot).join(5)
    started = time.perf_counter()
    snapshot.wait_for([owner])
    assert time.perf_counter() - started < 1
    with pytest.raises(RuntimeError, match="copying the state failed: device lost"):
        list(snapshot.blocks())
