"""Where each rank stands in the mesh: pure arithmetic, no torch.

A mesh has four axes. Unless `parallel.order` says otherwise ranks are numbered with tp fastest, then sp, then pp, then dp, so
that the chattiest axes stay inside a node when ranks are numbered node by node (torchrun, srun and deepspeed all do).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from anyshard.configs.schema import Config

AXES = ("tp", "sp", "pp", "dp")
"""Fastest-varying axis first, unless a mesh has an order of its own."""


@dataclass(frozen=True)
class Mesh:
    """Degrees of the four axes, and their order, the fastest-varying one first."""

    dp: int
    tp: int = 1
    pp: int = 1
    sp: int = 1
    order: tuple[str, ...] = AXES

    @property
    def world_size(self) -> int:
        """Ranks in the mesh."""
        return self.dp * self.tp * self.pp * self.sp

    def coordinates(self, rank: int) -> dict[str, int]:
        """Coordinate of a rank on each axis."""
        assert 0 <= rank < self.world_size, (rank, self)
        position = {}
        for axis in self.order:
            rank, position[axis] = divmod(rank, getattr(self, axis))
        return position

    def rank(self, **coordinates: int) -> int:
        """Rank at the given coordinates; axes left out are 0."""
        rank = 0
        for axis in reversed(self.order):
            rank = rank * getattr(self, axis) + coordinates.get(axis, 0)
        return rank

    def group(self, axes: str | Sequence[str], rank: int) -> list[int]:
        """Ranks that share every coordinate of `rank` but those of `axes`, in their order."""
        axes = (axes,) if isinstance(axes, str) else axes
        here = self.coordinates(rank)
        places = itertools.product(*(range(getattr(self, axis)) for axis in axes))
        return sorted(self.rank(**{**here, **dict(zip(axes, place, strict=True))}) for place in places)

    def groups(self, axes: str | Sequence[str]) -> list[list[int]]:
        """Every group along one or several axes, in the order of its first rank."""
        found = {tuple(self.group(axes, rank)): None for rank in range(self.world_size)}
        return [list(members) for members in found]


def mesh_of(config: Config) -> Mesh:
    """The mesh of a configuration whose ranks are known (`world.resolve_ranks`)."""
    parallel = config.parallel
    assert isinstance(parallel.dp, int), "parallel.dp is auto"
    return Mesh(parallel.dp, parallel.tp, parallel.pp, parallel.sp, tuple(parallel.order))


def draw(mesh: Mesh, hosts: Sequence[str]) -> list[str]:
    """Which rank is where, a line for each group of the innermost axis that is used.

    Args:
        hosts: host of every rank.
    """
    used = [axis for axis in mesh.order if getattr(mesh, axis) > 1] or ["dp"]
    inner, outer = used[0], used[1:]
    lines = []
    for members in mesh.groups(inner):
        place = mesh.coordinates(members[0])
        where = ", ".join(f"{axis} {place[axis]}" for axis in reversed(outer))
        here = list(dict.fromkeys(hosts[rank] for rank in members))
        ranks = " ".join(f"{rank:>{len(str(mesh.world_size - 1))}}" for rank in members)
        split = "" if len(here) == 1 or inner == "dp" else f"  <- {inner} crosses hosts"
        lines.append(f"{where + ': ' if where else ''}{inner} [{ranks}] on {', '.join(here)}{split}")
    return lines


def shorten(lines: list[str], limit: int = 16) -> list[str]:
    """The first and last lines of a long list, and how many are between."""
    if len(lines) <= limit:
        return lines
    half = limit // 2
    return [*lines[:half], f"... {len(lines) - 2 * half} more ...", *lines[-half:]]
