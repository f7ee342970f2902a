"""What a checkpoint of any format looks like to the commands: names, shapes, and one whole tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from anyshard.trainer.checkpoint import catalog
from anyshard.trainer.checkpoint.interop.output import reading
from anyshard.trainer.checkpoint.layout import Fragment
from anyshard.trainer.checkpoint.manifest import ITEM_BYTES, Commit, Manifest, Scalar, Tensor
from anyshard.trainer.checkpoint.reader import ChunkIndex, read_into

Key = tuple[str, str]
"""(canonical name, state key)."""


@dataclass(frozen=True)
class Record:
    """Everything that is not a tensor.

    Attributes:
        optimizer: class, kind and groups as in COMMIT; kind "none": it holds no states; groups {}: the run that resumes has its
            own.
        engine: as in COMMIT.
        tied: other name -> canonical name.
        notes: what was left behind, for people.
    """

    step: int
    optimizer: dict[str, Any]
    engine: dict[str, Any]
    layout: dict[str, Any]
    tied: dict[str, str]
    meta: dict[str, Any]
    scalars: list[Scalar]
    notes: list[str] = field(default_factory=list)


class Source(Protocol):
    """A checkpoint that can be read.

    Attributes:
        format: "anyshard", "hf", "universal" or "deepspeed".
        tensors: all of them, in the order in which they are best read.
    """

    path: Path
    format: str
    tensors: dict[Key, Tensor]
    record: Record

    def read(self, key: Key) -> torch.Tensor:
        """One whole tensor, in host memory that is the caller's.

        Raises:
            CheckpointError: it is damaged or cannot be read.
        """


class Stored:
    """A checkpoint of ours; every chunk is compared with its checksum as it is read."""

    format = "anyshard"

    def __init__(self, path: Path) -> None:
        """Read COMMIT and the manifests of the checkpoint directory `path`.

        Raises:
            CheckpointError: they are damaged.
        """
        self.path = path
        self.commit: Commit = catalog.read_commit(path)
        self.manifests: list[Manifest] = catalog.read_manifests(path, self.commit)
        self.chunks: ChunkIndex = catalog.index_chunks(self.manifests)
        self.tensors: dict[Key, Tensor] = {key: chunks[0].tensor for key, chunks in self.chunks.items()}
        commit = self.commit
        scalars = [scalar for manifest in self.manifests for scalar in manifest.scalars]
        self.record = Record(
            commit.step, commit.optimizer, commit.engine, commit.layout, commit.tied, commit.meta, merged(scalars)
        )

    def read(self, key: Key) -> torch.Tensor:
        """One whole tensor."""
        tensor = self.tensors[key]
        whole = torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype))
        with reading(self.path):
            read_into(self.path, [Fragment(tensor, 0, whole.view(-1), replicated=False)], self.chunks, verify=True)
        return whole


def merged(scalars: list[Scalar]) -> list[Scalar]:
    """The same scalars, those of one value together, each name once."""
    names: dict[tuple[str, str, float], dict[str, None]] = {}
    for scalar in scalars:
        names.setdefault((scalar.key, scalar.kind, scalar.value), {}).update(dict.fromkeys(scalar.names))
    return [Scalar(key, kind, value, tuple(members)) for (key, kind, value), members in names.items()]


def num_bytes(tensors: Mapping[Key, Tensor]) -> int:
    """Size of the elements of these tensors."""
    return sum(tensor.numel * ITEM_BYTES[tensor.dtype] for tensor in tensors.values())


def host_bytes(view: torch.Tensor) -> memoryview:
    """The bytes of a flat tensor; copied only where it is not on the host already."""
    return view.detach().cpu().contiguous().view(torch.uint8).numpy().data
