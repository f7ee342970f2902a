"""Where each rank stands in the mesh: pure arithmetic, no torch.

A mesh has four axes. Ranks are numbered with tp fastest, then sp, then pp, then dp, so that the chattiest axes stay
inside a node when ranks are numbered node by node (torchrun, srun and deepspeed all do).
"""

from __future__ import annotations

from dataclasses import dataclass

from anyshard.configs.schema import Config

AXES = ("tp", "sp", "pp", "dp")
"""Fastest-varying axis first."""


@dataclass(frozen=True)
class Mesh:
    """Degrees of the four axes."""

    dp: int
    tp: int = 1
    pp: int = 1
    sp: int = 1

    @property
    def world_size(self) -> int:
        """Ranks in the mesh."""
        return self.dp * self.tp * self.pp * self.sp

    def coordinates(self, rank: int) -> dict[str, int]:
        """Coordinate of a rank on each axis."""
        assert 0 <= rank < self.world_size, (rank, self)
        position = {}
        for axis in AXES:
            rank, position[axis] = divmod(rank, getattr(self, axis))
        return position

    def rank(self, **coordinates: int) -> int:
        """Rank at the given coordinates; axes left out are 0."""
        rank = 0
        for axis in reversed(AXES):
            rank = rank * getattr(self, axis) + coordinates.get(axis, 0)
        return rank

    def group(self, axis: str, rank: int) -> list[int]:
        """Ranks that share every coordinate of `rank` but that of `axis`, in order."""
        here = self.coordinates(rank)
        return [self.rank(**{**here, axis: i}) for i in range(getattr(self, axis))]

    def groups(self, axis: str) -> list[list[int]]:
        """Every group along an axis, in the order of its first rank."""
        found = {tuple(self.group(axis, rank)): None for rank in range(self.world_size)}
        return [list(members) for members in found]


def mesh_of(config: Config) -> Mesh:
    """The mesh of a configuration whose ranks are known (`world.resolve_ranks`)."""
    parallel = config.parallel
    assert isinstance(parallel.dp, int), "parallel.dp is auto"
    return Mesh(parallel.dp, parallel.tp, parallel.pp, parallel.sp)
