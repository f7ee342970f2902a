"""State that is in swap files between steps: read from them for a save, written through DeepSpeed's buffers for a restore.

A save reads the files piece by piece, past the page cache, into the blocks that it writes from: no more of the state is in
memory than those. The files change in the optimizer's step alone, so the guard that keeps a step from tensors that are not
copied yet keeps it from them too. A restore brings one sub-group at a time into memory, as a step does.

Source: deepspeed 0.19.8 runtime/zero/stage3.py:2710 (`_optimizer_states_and_gradient_swap_in`), :2761 (`..._swap_out`),
runtime/swap_tensor/partitioned_param_swapper.py:274 (`swap_out_and_release`).
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import mmap
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from anyshard.offload.mending import param_files, swapped_tensors

if TYPE_CHECKING:
    from anyshard.trainer.checkpoint.layout import Slot

PAGE_BYTES = 4096
READ_BYTES = 4 * 2**20
"""Of one read; also the host memory that reading takes."""


@dataclass(frozen=True)
class SwapFile:
    """Where the elements of a fragment begin in a swap file."""

    path: Path
    offset: int

    def read_into(self, address: int, start: int, num_bytes: int) -> None:
        """Read bytes from `start` of the fragment to an address.

        Raises:
            OSError: the file cannot be read, or ends early.
        """
        begin, done = self.offset + start, 0
        with contextlib.closing(mmap.mmap(-1, READ_BYTES + PAGE_BYTES)) as buffer, _opened(self.path) as descriptor:
            held = ctypes.c_char.from_buffer(buffer)
            source = ctypes.addressof(held)
            del held
            while done < num_bytes:
                skip = (begin + done) % PAGE_BYTES
                read = os.preadv(descriptor, [buffer], begin + done - skip) - skip
                if read <= 0:
                    raise OSError(f"{self.path} ends at byte {begin + done}: {num_bytes - done} bytes are missing")
                take = min(read, num_bytes - done)
                ctypes.memmove(address + done, source + skip, take)
                done += take


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def files_of(engine: Any) -> dict[int, Path]:
    """id of every tensor of the state that is in a swap file between steps -> the file."""
    found = dict(swapped_tensors(engine.optimizer))
    params = [param for param in engine.module.parameters() if getattr(param, "ds_tensor", None) is not None]
    paths = {str(path) for path in param_files(params)}
    for param in params:
        if paths and param.nvme_swapper is not None and str(param.nvme_swapper.get_path(param)) in paths:
            found[id(param.ds_tensor)] = Path(param.nvme_swapper.get_path(param))
    return found


def stand_in(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of this many elements and no memory, for the view of what is in a file."""
    return torch.empty(1, dtype=dtype).expand(numel)


def is_swapped(engine: Any, number: int) -> bool:
    """Whether a sub-group of ZeRO-3 is in swap files between steps."""
    return engine.optimizer.swap_optimizer and bool(engine.optimizer._swappable_optimizer_subgroup(number))


def in_turn(engine: Any, slots: Sequence[Slot]) -> Iterator[list[Slot]]:
    """All slots, those that are in memory first; then what is in swap files, brought into memory for the time of its turn.

    What is written into the slots of a turn is in the files when the next one is asked for, and the parameters that the model
    computes with are made of it.
    """
    swapped = {id(flat): number for number, flat in _flats(engine) if is_swapped(engine, number)}
    turns: dict[int, list[Slot]] = defaultdict(list)
    frozen: list[Slot] = []
    here: list[Slot] = []
    for slot in slots:
        if id(slot.flat) in swapped:
            turns[swapped[id(slot.flat)]].append(slot)
        else:
            (frozen if id(slot.flat) in slot.files else here).append(slot)
    yield here
    for number in sorted(turns):
        engine.optimizer._optimizer_states_and_gradient_swap_in(number)
        yield [dataclasses.replace(slot, files={}) for slot in turns[number]]
        engine.optimizer._reassign_or_swap_out_partitioned_parameters(number)
        engine.optimizer._optimizer_states_and_gradient_swap_out(number)
    params = {id(param.ds_tensor): param for param in engine.module.parameters()} if frozen else {}
    for slot in frozen:
        param: Any = params[id(slot.flat)]
        param.nvme_swapper.swap_in([param], async_op=False)
        yield [dataclasses.replace(slot, files={})]
        param.nvme_swapper.swap_out_and_release([param])


def _flats(engine: Any) -> list[tuple[int, torch.Tensor]]:
    return list(enumerate(engine.optimizer.fp32_partitioned_groups_flat)) if engine.zero_optimization_stage() == 3 else []
