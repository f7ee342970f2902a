"""What a parameter is a part of: written on it when tensor parallelism cuts it, read by checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from anyshard.parallel.split import Box

_ATTRIBUTE = "anyshard_part"


@dataclass(frozen=True)
class Part:
    """The box of a global parameter that a parameter of this rank holds.

    Attributes:
        name: canonical name of the global parameter; the parts of a fused one share it.
        shape: its global shape.
        holders: tensor-parallel ranks that hold the same box, in order.
    """

    name: str
    shape: tuple[int, ...]
    box: Box
    holders: tuple[int, ...]


def mark_part(param: torch.Tensor, part: Part) -> None:
    """Say what `param` is a part of."""
    setattr(param, _ATTRIBUTE, part)


def part_of(param: torch.Tensor) -> Part | None:
    """What `param` is a part of; None for a whole parameter."""
    part: Part | None = getattr(param, _ATTRIBUTE, None)
    return part
