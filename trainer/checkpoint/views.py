"""The live views of one engine's state that a rank saves: made once, looked over at every save.

Between two steps state tensors keep their memory, so what a save needs to know of them is the same every time. Finding it
anew costs the training thread milliseconds; comparing addresses costs a tenth of that. Whatever was replaced since (a state
that an optimizer made anew, a restored one, another param group) has everything looked for again.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from anyshard.trainer.checkpoint import layout, optimizers
from anyshard.trainer.checkpoint.partitions import PREFIX
from anyshard.trainer.checkpoint.snapshot import FilePlan
from anyshard.trainer.checkpoint.writer import fragments_to_write

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _State:
    """The states that the optimizer keeps for one of its tensors, and where they were."""

    owner: torch.Tensor
    addresses: dict[str, int]


@dataclass(frozen=True)
class Views:
    """What rank `rank` of `world_size` saves of `engine`, buffers excepted.

    Attributes:
        plan: the fragments, laid out in a data file.
        owners: what the optimizer steps, and the names of it under which this rank writes its scalar states.
        buffers: name, module and key of the persistent buffers that this rank writes.
        tied: other name -> canonical name.
    """

    optimizer: torch.optim.Optimizer
    plan: FilePlan
    owners: list[tuple[torch.Tensor, tuple[str, ...]]]
    buffers: list[tuple[str, nn.Module, str]]
    tied: dict[str, str]
    _group_sizes: list[int]
    _flats: list[tuple[torch.Tensor, int]]
    _states: list[_State]

    @classmethod
    def of(cls, engine: Any, *, rank: int, world_size: int, chunk_bytes: int, block_bytes: int) -> Views:
        """Look for them.

        Raises:
            CheckpointError: the layout of the engine is not known, or a state is not contiguous.
        """
        optimizer, slots, position = layout.inner_optimizer(engine), layout.slots(engine), layout.position(engine)
        mine = to_write(engine, optimizers.fragments(slots, optimizer, position=position), rank, world_size)
        names = {fragment.tensor.name for fragment in mine}
        flats = {id(slot.flat): slot.flat for slot in slots}
        owners = [
            (owner, tuple(name for name in members if name in names or name.startswith(PREFIX)))
            for owner, members in optimizers.owners(slots, optimizer, position=position)
            if names.intersection(members)
        ]
        if dropped := optimizers.left_out(optimizer):
            logger.warning("checkpoints do not hold %s of the optimizer: only tensors and numbers", ", ".join(dropped))
        stepped = {id(slot.owner): slot.owner for slot in slots if slot.owner is not None}
        return cls(
            optimizer,
            FilePlan.of(mine, chunk_bytes, block_bytes),
            owners,
            layout.written_buffers(engine, rank),
            layout.tied_names(engine.module),
            _group_sizes(optimizer),
            [(flat, flat.data_ptr()) for flat in flats.values()],
            [_State(owner, _addresses(optimizer, owner)) for owner in stepped.values()],
        )

    def are_of(self, engine: Any) -> bool:
        """Whether the engine still has everything where it was."""
        optimizer = layout.inner_optimizer(engine)
        return (
            optimizer is self.optimizer
            and all(flat.data_ptr() == address for flat, address in self._flats)
            and _group_sizes(optimizer) == self._group_sizes
            and all(_addresses(optimizer, state.owner) == state.addresses for state in self._states)
        )

    def copied_buffers(self) -> list[layout.Fragment]:
        """Copies of the buffers as they are now: a forward pass may change them."""
        places = [(name, module._buffers[key]) for name, module, key in self.buffers]
        found = [layout.buffer_fragment(name, buffer) for name, buffer in places if buffer is not None]
        return [dataclasses.replace(fragment, view=fragment.view.clone()) for fragment in found]


def to_write(engine: Any, held: list[layout.Fragment], rank: int, world_size: int) -> list[layout.Fragment]:
    """What this rank writes of what it holds, so that over all ranks every element is written once."""
    if engine.mpu is not None:
        left = layout.left_to_others(engine)
        held = [fragment for fragment in held if (fragment.tensor.name, fragment.shard) not in left]
        rank, world_size = engine.mpu.get_data_parallel_rank(), engine.mpu.get_data_parallel_world_size()
    return fragments_to_write(held, rank, world_size)


def _group_sizes(optimizer: torch.optim.Optimizer) -> list[int]:
    return [len(group["params"]) for group in optimizer.param_groups]


def _addresses(optimizer: torch.optim.Optimizer, owner: torch.Tensor) -> dict[str, int]:
    state = optimizer.state.get(owner, {})
    return {key: value.data_ptr() for key, value in state.items() if isinstance(value, torch.Tensor) and value.dim()}
