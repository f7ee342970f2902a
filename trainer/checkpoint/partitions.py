"""Optimizer states that cannot be cut as their parameter is: scales of blocks, rows and columns, statistics of a whole tensor.

All tensor states of what the optimizer steps then belong together: 8-bit codes mean nothing without their scales. Where it is
one whole parameter they are stored under the parameter's name, each with its own shape, for whatever layout holds it whole.
Where it is a partition of ZeRO or a shard they are stored under a name made of all that the partition is: a run of the same
layout makes the same name and finds them, any other does not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

import torch

from anyshard.trainer.checkpoint.layout import Fragment, Slot, dtype_name, view_of
from anyshard.trainer.checkpoint.manifest import PARAM, Tensor, digest

PREFIX = "@partition-"
"""Of the names of partitions; no parameter's name begins so."""

Stored = Mapping[str, Mapping[str, Tensor]]
"""Name -> state key -> tensor in the checkpoint."""


def by_owner(slots: Iterable[Slot]) -> list[tuple[torch.Tensor, list[Slot]]]:
    """What the optimizer steps, and the parts of parameters in each."""
    found: dict[int, tuple[torch.Tensor, list[Slot]]] = {}
    for slot in slots:
        if slot.owner is not None:
            found.setdefault(id(slot.owner), (slot.owner, []))[1].append(slot)
    return list(found.values())


def name_of(owner: torch.Tensor, members: Sequence[Slot], position: str) -> str:
    """The name under which states of other shapes are stored: the parameter's, if this is one whole parameter."""
    if is_whole(owner, members):
        return members[0].name
    places = [[slot.name, slot.shape, slot.shard, slot.start, slot.numel, slot.offset] for slot in members]
    return PREFIX + digest(json.dumps([position, list(owner.shape), places]).encode())


def is_whole(owner: torch.Tensor, members: Sequence[Slot]) -> bool:
    """Whether it is one parameter, neither cut nor flattened."""
    slot = members[0]
    return len(members) == 1 and slot.shard is None and slot.start == 0 and tuple(owner.shape) == slot.shape


def own_fragment(name: str, key: str, state: torch.Tensor, slot: Slot) -> Fragment:
    """A state in its own shape.

    Args:
        slot: one of the parts of what it belongs to.
    """
    here = Slot(name, tuple(state.shape), 0, state.numel(), state, 0, slot.owner, slot.replicated)
    tensor = Tensor(name, key, dtype_name(state.dtype), here.shape)
    return Fragment(tensor, 0, view_of(here, state), slot.replicated, None, slot.owner)


def stored_whole(
    owner: torch.Tensor, members: Sequence[Slot], stored: Stored, position: str
) -> tuple[str, list[Tensor]] | None:
    """The name and the states to restore in their own shapes; None where the checkpoint has none that fit this partition."""
    name = name_of(owner, members, position)
    if is_whole(owner, members) and not _has_other_shapes(members[0], stored):
        return None
    states = [tensor for key, tensor in stored.get(name, {}).items() if key != PARAM]
    return (name, states) if states else None


def has_partitions(stored: Stored) -> bool:
    """Whether the checkpoint holds states that only its own layout can take."""
    return any(name.startswith(PREFIX) for name in stored)


def is_torn(members: Sequence[Slot], stored: Stored, *, some_elsewhere: bool) -> bool:
    """Whether states of these parameters cannot be put together for a partition of this layout.

    Args:
        some_elsewhere: `has_partitions`; what has no states at all then has them there.
    """
    if any(_has_other_shapes(slot, stored) for slot in members):
        return True
    if some_elsewhere and any(set(stored[slot.name]) <= {PARAM} for slot in members):
        return True
    dtypes: dict[str, set[str]] = {}
    for slot in members:
        for key, tensor in stored[slot.name].items():
            dtypes.setdefault(key, set()).add(tensor.dtype)
    return any(len(kinds) > 1 and not all("float" in kind for kind in kinds) for kinds in dtypes.values())


def _has_other_shapes(slot: Slot, stored: Stored) -> bool:
    return any(key != PARAM and tensor.shape != slot.shape for key, tensor in stored[slot.name].items())
