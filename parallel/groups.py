"""The process groups of a mesh, as ours and as DeepSpeed asks for them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.distributed as dist

from anyshard.parallel.topology import Mesh


@dataclass(frozen=True)
class Groups:
    """Where this rank stands, and whom it talks to.

    Attributes:
        tp: the ranks that share this rank's data and split its tensors; None when alone.
        dp: the ranks that hold the same part of the model; None for all ranks.
        tp_parts: groups of neighbours inside `tp`, by their tp ranks: those that this rank is in.
        pp: the ranks that hold the stages of one pipeline, in order; None where there is one stage.
        pp_ends: the first and the last of them, on those two only.
    """

    mesh: Mesh
    rank: int
    tp: dist.ProcessGroup | None = None
    dp: dist.ProcessGroup | None = None
    tp_parts: dict[tuple[int, ...], dist.ProcessGroup] = field(default_factory=dict)
    pp: dist.ProcessGroup | None = None
    pp_ends: dist.ProcessGroup | None = None

    @property
    def tp_rank(self) -> int:
        """Position among the ranks that split the tensors."""
        return self.mesh.coordinates(self.rank)["tp"]

    @property
    def dp_rank(self) -> int:
        """Position among the ranks that split the data."""
        return self.mesh.coordinates(self.rank)["dp"]

    @property
    def pp_rank(self) -> int:
        """The stage of the pipeline."""
        return self.mesh.coordinates(self.rank)["pp"]

    @property
    def stream(self) -> tuple[int, ...]:
        """What random numbers of training depend on: ranks that compute the same draw the same."""
        return (self.dp_rank,) if self.mesh.pp == 1 else (self.dp_rank, self.pp_rank)

    def subgroup(self, tp_ranks: tuple[int, ...]) -> dist.ProcessGroup:
        """The group of these ranks of `tp`."""
        return self.tp_parts[tp_ranks]

    def mpu(self) -> Mpu | None:
        """What `deepspeed.initialize` takes for its `mpu`; None for data parallelism alone, and for a pipeline.

        Without it DeepSpeed's batch arithmetic counts every rank as data-parallel (deepspeed 0.19.8 runtime/config.py:471).
        """
        return Mpu(self) if self.tp is not None and self.pp is None else None


def create_groups(mesh: Mesh, rank: int) -> Groups:
    """Make the groups of a mesh.

    Collective: every rank calls it with the same mesh; it blocks.
    """
    if mesh.tp == 1 and mesh.pp == 1:
        return Groups(mesh, rank)
    mine: dict[str, dist.ProcessGroup] = {}
    for axis in ("tp", "dp", "pp"):
        for members in mesh.groups(axis) if axis == "dp" or getattr(mesh, axis) > 1 else ():
            group = dist.new_group(members)
            if rank in members:
                mine[axis] = group
    ends = _ends(mesh, rank)
    if mesh.tp == 1:
        return Groups(mesh, rank, dp=mine["dp"], pp=mine["pp"], pp_ends=ends)
    parts: dict[tuple[int, ...], dist.ProcessGroup] = {tuple(range(mesh.tp)): mine["tp"]}
    for size in (n for n in range(2, mesh.tp) if mesh.tp % n == 0):
        for members in mesh.groups("tp"):
            for first in range(0, mesh.tp, size):
                group = dist.new_group(members[first : first + size])
                if rank in members[first : first + size]:
                    parts[tuple(range(first, first + size))] = group
    return Groups(mesh, rank, mine["tp"], mine["dp"], parts, mine.get("pp"), ends)


def _ends(mesh: Mesh, rank: int) -> dist.ProcessGroup | None:
    """The group of the first and the last stage of this rank's pipeline; None on the others. Collective."""
    found = None
    for members in mesh.groups("pp") if mesh.pp > 1 else ():
        group = dist.new_group([members[0], members[-1]])
        if rank in (members[0], members[-1]):
            found = group
    return found


class Mpu:
    """DeepSpeed's "model parallel unit": the interface that Megatron's clients give it.

    Source: deepspeed 0.19.8 utils/groups.py:770 (data parallel), utils/bwc.py:34 (tensor), runtime/utils.py:394 (model).
    """

    def __init__(self, groups: Groups) -> None:
        self._groups = groups

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        """The ranks over which ZeRO shards."""
        return self._groups.dp

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Their global ranks."""
        return self._groups.mesh.group("dp", self._groups.rank)

    def get_data_parallel_rank(self) -> int:
        """Position among them."""
        return self._groups.dp_rank

    def get_data_parallel_world_size(self) -> int:
        """Their number."""
        return self._groups.mesh.dp

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        """The ranks over which gradient norms are summed."""
        return self._groups.tp

    def get_model_parallel_rank(self) -> int:
        """Position among them; rank 0 counts what all of them hold."""
        return self._groups.tp_rank

    def get_model_parallel_world_size(self) -> int:
        """Their number."""
        return self._groups.mesh.tp

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
