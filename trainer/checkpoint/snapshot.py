"""A rank's state at one step, copied to the host in the background while training goes on.

State tensors change in the optimizer's step and nowhere else. So the copy may run during the next forward and backward,
in the order in which the optimizer will want the tensors, and its step waits only for those that it is about to change
and that are not copied yet: `UpdateGuard` sees to that. What is copied is handed on block by block to be written; with
fewer blocks than the state needs, copying proceeds as writing gives blocks back, and the step waits the longer.

Source: Maurya et al., "DataStates-LLM: Lazy Asynchronous Checkpointing for Large Language Models", HPDC'24.
"""

from __future__ import annotations

import ctypes
import dataclasses
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from anyshard.trainer.checkpoint.layout import Fragment
from anyshard.trainer.checkpoint.manifest import ALIGN_BYTES, ITEM_BYTES
from anyshard.trainer.checkpoint.staging import Block, StagingPool


@dataclass(frozen=True)
class Piece:
    """`numel` elements from `start` of a fragment, and their place in the data file."""

    fragment: Fragment
    start: int
    numel: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Filled:
    """A block that holds the bytes of the data file from `offset` on.

    Attributes:
        copied: event after which a device has written the block; None where the host did.
    """

    block: Block
    offset: int
    num_bytes: int
    pieces: Sequence[Piece]
    copied: Any = None

    @property
    def data(self) -> memoryview:
        """The bytes to write."""
        return self.block.data[: self.num_bytes]

    def bytes_of(self, piece: Piece) -> memoryview:
        """The bytes of one piece."""
        at = piece.offset - self.offset
        return self.block.data[at : at + piece.nbytes]


def cut(fragments: Iterable[Fragment], chunk_bytes: int, block_bytes: int) -> tuple[list[list[Piece]], int]:
    """Lay fragments out in a data file, in pieces that neither exceed `chunk_bytes` nor cross a block (pure).

    Returns:
        The pieces of every block, and the size of the file. Pieces begin at multiples of 4 KiB.
    """
    blocks: list[list[Piece]] = []
    offset = 0
    for fragment in fragments:
        item_bytes, start = ITEM_BYTES[fragment.tensor.dtype], 0
        while start < fragment.numel:
            number, used = divmod(offset, block_bytes)
            if number == len(blocks):
                blocks.append([])
            numel = min(fragment.numel - start, min(chunk_bytes, block_bytes - used) // item_bytes)
            blocks[-1].append(Piece(fragment, start, numel, offset, numel * item_bytes))
            start += numel
            offset += _aligned(numel * item_bytes)
    return blocks, offset


@dataclass(frozen=True)
class FilePlan:
    """Where the pieces of fragments go in a data file: made once for tensors that stay where they are.

    Attributes:
        num_bytes: size of the data file.
        needed: id of what the optimizer steps -> pieces up to its last one.
        device: of the fragments that are not in host memory; None where all are.
        file_bytes: of the pieces that are in swap files, and go through few blocks of memory.
    """

    blocks: list[list[Piece]]
    num_bytes: int
    num_pieces: int
    needed: dict[int, int]
    device: torch.device | None
    file_bytes: int = 0

    @classmethod
    def of(cls, fragments: Iterable[Fragment], chunk_bytes: int, block_bytes: int) -> FilePlan:
        """Lay fragments out as `cut` does."""
        blocks, num_bytes = cut(fragments, chunk_bytes, block_bytes)
        num_pieces, needed, device, in_files = 0, {}, None, 0
        for piece in (piece for pieces in blocks for piece in pieces):
            num_pieces += 1
            in_files += 0 if piece.fragment.file is None else piece.nbytes
            if piece.fragment.owner is not None:
                needed[id(piece.fragment.owner)] = num_pieces
            device = piece.fragment.view.device if piece.fragment.view.is_cuda else device
        return cls(blocks, num_bytes, num_pieces, needed, device, in_files)

    def then(self, fragments: Iterable[Fragment], chunk_bytes: int, block_bytes: int) -> FilePlan:
        """The same with more fragments, in blocks of their own after the others."""
        more = FilePlan.of(fragments, chunk_bytes, block_bytes)
        if not more.num_pieces:
            return self
        moved = [[dataclasses.replace(piece, offset=piece.offset + self.num_bytes) for piece in each] for each in more.blocks]
        needed = self.needed | {owner: self.num_pieces + count for owner, count in more.needed.items()}
        return FilePlan(
            self.blocks + moved,
            self.num_bytes + more.num_bytes,
            self.num_pieces + more.num_pieces,
            needed,
            more.device or self.device,
            self.file_bytes + more.file_bytes,
        )


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGN_BYTES) * ALIGN_BYTES


class Snapshot:
    """The fragments of one rank on their way to the host.

    Made between two steps by the training thread. `copy` then runs on one background thread, `blocks` on another.

    Attributes:
        num_bytes: size of the data file.
        waited_s: how long optimizer steps waited for it.
    """

    def __init__(self, plan: FilePlan, pool: StagingPool) -> None:
        self._layout, self.num_bytes = plan.blocks, plan.num_bytes
        self._pool = pool
        self._num_pieces, self._needed = plan.num_pieces, plan.needed
        self._side = _SideStream(plan.device) if plan.device is not None else None
        self._changed = threading.Condition()
        self._num_copied = 0
        self._filled: deque[Filled | None] = deque()
        self._given_up = False
        self._error: BaseException | None = None
        self.waited_s = 0.0

    def copy(self, copied: Callable[[], None]) -> None:
        """Copy everything and call `copied`; returns early once the snapshot is given up. An error is raised by `blocks`."""
        try:
            for filled in self._fill():
                self._hand_on(filled)
            if not self._given_up:
                copied()
        except BaseException as error:
            self._error = error
            self.give_up()
        self._hand_on(None)

    def _hand_on(self, filled: Filled | None) -> None:
        with self._changed:
            wanted = filled is None or not self._given_up
            if wanted:
                self._filled.append(filled)
                self._changed.notify_all()
        if filled is not None and not wanted:
            self._release(filled)

    def _release(self, filled: Filled) -> None:
        if filled.copied is not None:
            filled.copied.synchronize()
        self._pool.release(filled.block)

    def blocks_here(self) -> Iterator[Filled]:
        """As `blocks`, but copied by the thread that iterates, without a second one."""
        for filled in self._fill():
            if filled.copied is not None:
                filled.copied.synchronize()
            yield filled
            self._release(filled)

    def _fill(self) -> Iterator[Filled]:
        for pieces in self._layout:
            block = self._pool.acquire(lambda: self._given_up)
            if block is None:
                return
            offset, copied = pieces[0].offset, None
            for piece in pieces:
                self._copy_piece(piece, block, piece.offset - offset)
                if self._side is None:
                    self._count(1)
            if self._side is not None:
                copied = self._side.mark()
                self._count(len(pieces))
            end = pieces[-1].offset + _aligned(pieces[-1].nbytes)
            yield Filled(block, offset, end - offset, pieces, copied)

    def _copy_piece(self, piece: Piece, block: Block, at: int) -> None:
        padding = _aligned(piece.nbytes) - piece.nbytes
        if padding:
            ctypes.memset(block.address + at + piece.nbytes, 0, padding)
        if piece.fragment.file is not None:
            start = piece.start * ITEM_BYTES[piece.fragment.tensor.dtype]
            piece.fragment.file.read_into(block.address + at, start, piece.nbytes)
            return
        view = piece.fragment.view.narrow(0, piece.start, piece.numel)
        if self._side is not None and view.is_cuda:
            self._side.copy(block.tensor.narrow(0, at, piece.nbytes), view)
        else:
            # not Tensor.copy_, which would start threads of its own beside those that train; releases the lock as well
            ctypes.memmove(block.address + at, view.data_ptr(), piece.nbytes)

    def _count(self, num_pieces: int) -> None:
        with self._changed:
            self._num_copied += num_pieces
            self._changed.notify_all()

    def blocks(self) -> Generator[Filled]:
        """Copied blocks in order, each the caller's until it asks for the next.

        Raises:
            RuntimeError: copying failed.
        """
        while True:
            with self._changed:
                while not self._filled:
                    self._changed.wait()
                filled = self._filled.popleft()
            if filled is None:
                break
            try:
                if filled.copied is not None:
                    filled.copied.synchronize()
                yield filled
            finally:
                self._release(filled)
        if self._error is not None:
            raise RuntimeError(f"copying the state failed: {self._error}") from self._error

    @property
    def is_copied(self) -> bool:
        """Whether nothing of the live state is needed any more."""
        return self._given_up or self._num_copied == self._num_pieces

    def wait_for(self, owners: Iterable[torch.Tensor]) -> None:
        """Wait until these tensors of the optimizer, and all their states, are copied."""
        # a tensor that is not known here may share memory with any: wait for all
        self._wait(max((self._needed.get(id(owner), self._num_pieces) for owner in owners), default=0))

    def wait_for_all(self) -> None:
        """Wait until everything is copied."""
        self._wait(self._num_pieces)

    def _wait(self, needed: int) -> None:
        started = time.perf_counter()
        with self._changed:
            while self._num_copied < needed and not self._given_up:
                self._changed.wait()
        if self._side is not None and needed and not self._given_up:
            self._side.hold_up_training()
        self.waited_s += time.perf_counter() - started

    def give_up(self) -> None:
        """Nobody wants it any more: stop copying, let every waiting step go, and return what is copied to the pool."""
        with self._changed:
            self._given_up = True
            left = [filled for filled in self._filled if filled is not None]
            self._filled = deque(filled for filled in self._filled if filled is None)
            self._changed.notify_all()
        for filled in left:
            self._release(filled)
        self._pool.wake()


class _SideStream:
    """Copies off a CUDA device, beside what it computes. Made by the training thread."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(device))  # all of the last step comes first
        self._last: Any = None

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.copy_(source.view(torch.uint8), non_blocking=True)

    def mark(self) -> Any:
        """An event at the end of all copies begun so far."""
        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        self._last = event
        return event

    def hold_up_training(self) -> None:
        """Have the device wait, not the host: its next kernel starts after the copies begun so far."""
        torch.cuda.current_stream(self._device).wait_event(self._last)


class UpdateGuard:
    """Keeps optimizers from changing a tensor that a snapshot still has to copy.

    It is a hook of the optimizer that DeepSpeed steps, so it knows which tensors a step is about to change: all at ZeRO 0,
    one param group at ZeRO 1 and 2, one sub-group at ZeRO 3. Nothing is waited for at the other micro-steps.

    Source: deepspeed 0.19.8 runtime/zero/stage_1_and_2.py and stage3.py, `_optimizer_step`: `param_groups` hold exactly what
    is stepped.

    Attributes:
        stall_s: how long steps have waited in all.
    """

    def __init__(self) -> None:
        self.stall_s = 0.0
        self._snapshots: list[Snapshot] = []
        self._hooked: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()

    def protect(self, snapshot: Snapshot, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """From now on steps of these optimizers wait for `snapshot`."""
        for optimizer in optimizers:
            if optimizer not in self._hooked:
                optimizer.register_step_pre_hook(self._before_step)
                self._hooked.add(optimizer)
        self._snapshots.append(snapshot)

    def wait(self) -> None:
        """Wait until everything is copied."""
        for snapshot in self._snapshots:
            snapshot.wait_for_all()
        self._snapshots = []

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not self._snapshots:
            return
        owners = [param for group in optimizer.param_groups for param in group["params"]]
        started = time.perf_counter()
        for snapshot in self._snapshots:
            snapshot.wait_for(owners)
        self.stall_s += time.perf_counter() - started
        self._snapshots = [snapshot for snapshot in self._snapshots if not snapshot.is_copied]
