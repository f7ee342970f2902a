"""Host memory that snapshots are copied into: blocks that are made once, page-aligned, and used again by every save.

Fresh memory costs several times what copying costs (every page is faulted in and zeroed), so blocks are kept. Their
alignment is what direct writes ask for. Where state is on a CUDA device they are page-locked, so that the device writes
them without a detour.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Callable
from functools import cached_property
from typing import Any

import psutil
import torch

BLOCK_BYTES = 16 * 2**20
"""Size of a block: large enough for a disk's full rate, small enough to hand on early."""
MIN_BLOCKS = 4
"""Fewest blocks of a pool: one is copied into while another is written, and both have a next one."""
MEMORY_SHARE = 0.25
"""Most of the free host memory that staging takes where nobody set a bound."""


class Block:
    """`num_bytes` of page-aligned host memory; zeros at first.

    Attributes:
        address: where it begins.
        data: its bytes.
    """

    def __init__(self, num_bytes: int, *, pinned: bool = False) -> None:
        self._memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self.data = memoryview(self._memory)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        if pinned:
            runtime: Any = torch.cuda
            runtime.check_error(int(runtime.cudart().cudaHostRegister(self.address, num_bytes, 0)))

    @cached_property
    def tensor(self) -> torch.Tensor:
        """The same bytes as a tensor."""
        return torch.frombuffer(self._memory, dtype=torch.uint8)

    def touch(self) -> None:
        """Have the system provide the pages now. Releases the interpreter lock."""
        ctypes.memset(self.address, 0, len(self.data))


class StagingPool:
    """Blocks for one rank's snapshots; any thread takes and returns them.

    Args:
        pinned: page-lock the blocks for a CUDA device.

    Attributes:
        max_blocks: how many there may be. It can be raised at any time; one that is lowered takes effect on new blocks.
    """

    def __init__(self, max_blocks: int, *, block_bytes: int = BLOCK_BYTES, pinned: bool = False) -> None:
        self.max_blocks = max_blocks
        self.block_bytes = block_bytes
        self._pinned = pinned
        self._free: list[Block] = []
        self._num_made = 0
        self._changed = threading.Condition()

    def acquire(self, given_up: Callable[[], bool]) -> Block | None:
        """A block; waits until one is free when there may be no more.

        Returns:
            None when `given_up()` is true, looked at again after every `wake()`.
        """
        with self._changed:
            while not given_up():
                if self._free:
                    return self._free.pop()
                if self._num_made < self.max_blocks:
                    self._num_made += 1
                    break
                self._changed.wait()
            else:
                return None
        return Block(self.block_bytes, pinned=self._pinned)  # not under the lock: it takes a while

    def release(self, block: Block) -> None:
        """Give a block back."""
        with self._changed:
            self._free.append(block)
            self._changed.notify()

    def wake(self) -> None:
        """Have every `acquire` that waits look at its `given_up` again."""
        with self._changed:
            self._changed.notify_all()

    def prepare(self, num_blocks: int) -> None:
        """Make blocks, with their pages, until there are `num_blocks` or as many as there may be."""
        while True:
            with self._changed:
                if self._num_made >= min(num_blocks, self.max_blocks):
                    return
                self._num_made += 1
            block = Block(self.block_bytes, pinned=self._pinned)
            block.touch()
            self.release(block)

    @property
    def num_bytes(self) -> int:
        """Memory that the pool holds."""
        return self._num_made * self.block_bytes


def blocks_for(num_bytes: int, block_bytes: int = BLOCK_BYTES) -> int:
    """Blocks that hold `num_bytes`."""
    return -(-num_bytes // block_bytes)


def max_blocks(snapshot_bytes: int, staging_bytes: int | None, *, free_bytes: int, block_bytes: int = BLOCK_BYTES) -> int:
    """How many blocks a rank may have: two snapshots, unless that is more than it should take (pure).

    Args:
        staging_bytes: the bound that was set; None takes at most a quarter of `free_bytes`.
        free_bytes: this rank's part of the host memory that nothing uses.
    """
    bound = int(MEMORY_SHARE * free_bytes) if staging_bytes is None else staging_bytes
    return max(MIN_BLOCKS, min(2 * blocks_for(snapshot_bytes, block_bytes), bound // block_bytes))


def free_host_bytes() -> int:
    """This rank's part of the host memory that is free."""
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
