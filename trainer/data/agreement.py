"""Ranks that must train on the same samples (along tp, pp and sp) tell each other a digest of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from anyshard.configs.errors import TrainError
from anyshard.parallel.topology import Mesh
from anyshard.trainer.task import Batch

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ODD = -7046029254386353131  # 2**64 divided by the golden ratio, as int64; sums wrap around


def digest(batches: Sequence[Batch]) -> torch.Tensor:
    """A number that changes with any value of the batches, its place and its tensor's name; made on their device.

    Shape: a scalar, int64.
    """
    total = torch.zeros((), dtype=torch.int64)
    for batch in batches:
        for name in sorted(batch):
            value = batch[name].detach().contiguous()
            total = total.to(value.device)
            bits = value.view(-1).view(_INTEGERS[value.element_size()]).long()
            places = torch.arange(1, bits.numel() + 1, device=value.device) * _ODD
            total = total * 31 + (bits * (places | 1)).sum() + sum(name.encode())
    return total


def require_same_data(batches: Sequence[Batch], mesh: Mesh, step: int) -> None:
    """Compare the batches of the ranks of every data-parallel replica.

    Collective: every rank calls it; it blocks (8 bytes from each rank).

    Raises:
        TrainError: ranks of one replica have different ones; on every rank, naming them.
    """
    mine = digest(batches)
    found = mine.new_empty(mesh.world_size)
    dist.all_gather_into_tensor(found, mine[None])
    numbers = found.tolist()
    for replica in mesh.groups(("tp", "sp", "pp")):
        alike: dict[int, list[int]] = {}
        for rank in replica:
            alike.setdefault(numbers[rank], []).append(rank)
        if len(alike) > 1:
            raise TrainError(_message(list(alike.values()), step))


def _message(parts: list[list[int]], step: int) -> str:
    told = " and others to ".join(f"rank{'s' * (len(part) > 1)} {', '.join(map(str, part))}" for part in parts)
    return (
        f"at step {step} the data loader gave some samples to {told}, which share a model and must train on the same. "
        "Give every host the same files (data.path and the cache of tokens), and a data set of your own the same samples "
        "under the same index on every rank. train.check_data_every_steps=0 goes on regardless."
    )
