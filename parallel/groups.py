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
        sp: the ranks that share this rank's data and split its sequences; None when alone.
        dp: the ranks that hold the same part of the model, along dp and sp: ZeRO shards over them; None for all ranks.
        tp_parts: groups of neighbours inside `tp`, by their tp ranks: those that this rank is in.
        pp: the ranks that hold the stages of one pipeline, in order; None where there is one stage.
        pp_ends: the first and the last of them, on those two only.
    """

    mesh: Mesh
    rank: int
    tp: dist.ProcessGroup | None = None
    dp: dist.ProcessGroup | None = None
    sp: dist.ProcessGroup | None = None
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
    def sp_rank(self) -> int:
        """Position among the ranks that split the sequences."""
        return self.mesh.coordinates(self.rank)["sp"]

    @property
    def shard_rank(self) -> int:
        """Position among the ranks over which ZeRO shards; that along dp where sequences are whole."""
        return self.mesh.group(("dp", "sp"), self.rank).index(self.rank)

    @property
    def num_shards(self) -> int:
        """Ranks over which ZeRO shards, each with tokens of its own."""
        return self.mesh.dp * self.mesh.sp

    @property
    def stream(self) -> tuple[int, ...]:
        """What random numbers of training depend on: ranks that compute the same draw the same."""
        return (self.shard_rank,) if self.mesh.pp == 1 else (self.dp_rank, self.pp_rank)

    def subgroup(self, tp_ranks: tuple[int, ...]) -> dist.ProcessGroup:
        """The group of these ranks of `tp`."""
        return self.tp_parts[tp_ranks]

    def mpu(self) -> Mpu | None:
        """What `deepspeed.initialize` takes for its `mpu`; None where every rank holds the whole model, and for a pipeline.

        Without it DeepSpeed's batch arithmetic counts every rank as data-parallel (deepspeed 0.19.8 runtime/config.py:471).
        """
        return Mpu(self) if self.tp is not None and self.pp is None else None


def create_groups(mesh: Mesh, rank: int) -> Groups:
    """Make the groups of a mesh.

    Collective: every rank calls it with the same mesh; it blocks.
    """
    sp = _new_group(mesh, ("sp",), rank) if mesh.sp > 1 else None
    if mesh.tp == 1 and mesh.pp == 1:
        return Groups(mesh, rank, sp=sp)
    dp = _new_group(mesh, ("dp", "sp"), rank)
    tp = _new_group(mesh, ("tp",), rank) if mesh.tp > 1 else None
    pp = _new_group(mesh, ("pp",), rank) if mesh.pp > 1 else None
    ends = _ends(mesh, rank)
    if tp is None:
        return Groups(mesh, rank, dp=dp, sp=sp, pp=pp, pp_ends=ends)
    parts: dict[tuple[int, ...], dist.ProcessGroup] = {tuple(range(mesh.tp)): tp}
    for size in (n for n in range(2, mesh.tp) if mesh.tp % n == 0):
        for members in mesh.groups("tp"):
            for first in range(0, mesh.tp, size):
                group = dist.new_group(members[first : first + size])
                if rank in members[first : first + size]:
                    parts[tuple(range(first, first + size))] = group
    return Groups(mesh, rank, tp, dp, sp, parts, pp, ends)


def _ends(mesh: Mesh, rank: int) -> dist.ProcessGroup | None:
    """The group of the first and the last stage of this rank's pipeline; None on the others. Collective."""
    found = None
    for members in mesh.groups("pp") if mesh.pp > 1 else ():
        group = dist.new_group([members[0], members[-1]])
        if rank in (members[0], members[-1]):
            found = group
    return found


def _new_group(mesh: Mesh, axes: tuple[str, ...], rank: int) -> dist.ProcessGroup:
    """This rank's group along some axes. Collective: every rank makes the groups of all."""
    made = [(members, dist.new_group(members)) for members in mesh.groups(axes)]
    (mine,) = [group for members, group in made if rank in members]
    return mine  # type: ignore[no-any-return]


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
        return self._groups.mesh.group(("dp", "sp"), self._groups.rank)

    def get_data_parallel_rank(self) -> int:
        """Position among them."""
        return self._groups.shard_rank

    def get_data_parallel_world_size(self) -> int:
        """Their number."""
        return self._groups.num_shards

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
