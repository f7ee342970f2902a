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
    """

    mesh: Mesh
    rank: int
    tp: dist.ProcessGroup | None = None
    dp: dist.ProcessGroup | None = None
    tp_parts: dict[tuple[int, ...], dist.ProcessGroup] = field(default_factory=dict)

    @property
    def tp_rank(self) -> int:
        """Position among the ranks that split the tensors."""
        return self.mesh.coordinates(self.rank)["tp"]

    @property
    def dp_rank(self) -> int:
        """Position among the ranks that split the data."""
        return self.mesh.coordinates(self.rank)["dp"]

    def subgroup(self, tp_ranks: tuple[int, ...]) -> dist.ProcessGroup:
        """The group of these ranks of `tp`."""
        return self.tp_parts[tp_ranks]

    def mpu(self) -> Mpu | None:
        """What `deepspeed.initialize` takes for its `mpu`; None for data parallelism alone.

        Without it DeepSpeed's batch arithmetic counts every rank as data-parallel (deepspeed 0.19.8 runtime/config.py:471).
        """
        return Mpu(self) if self.tp is not None else None


def create_groups(mesh: Mesh, rank: int) -> Groups:
    """Make the groups of a mesh.

    Collective: every rank calls it with the same mesh; it blocks.
    """
    if mesh.tp == 1:
        return Groups(mesh, rank)
    mine = {}
    for axis in ("tp", "dp"):
        for members in mesh.groups(axis):
            group = dist.new_group(members)
            if rank in members:
                mine[axis] = group
    parts: dict[tuple[int, ...], dist.ProcessGroup] = {tuple(range(mesh.tp)): mine["tp"]}
    for size in (n for n in range(2, mesh.tp) if mesh.tp % n == 0):
        for members in mesh.groups("tp"):
            for first in range(0, mesh.tp, size):
                group = dist.new_group(members[first : first + size])
                if rank in members[first : first + size]:
                    parts[tuple(range(first, first + size))] = group
    return Groups(mesh, rank, mine["tp"], mine["dp"], parts)


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
