"""One rank's files of a checkpoint: its fragments in one sequential data file, and the manifest that lists them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from anyshard.trainer.checkpoint.boxes import share, split
from anyshard.trainer.checkpoint.layout import Fragment
from anyshard.trainer.checkpoint.manifest import (
    ALIGN_BYTES,
    ITEM_BYTES,
    Chunk,
    FileRef,
    Manifest,
    Scalar,
    data_name,
    digest,
    dump_manifest,
    manifest_name,
)
from anyshard.trainer.checkpoint.storage import new_file, write_at, write_durably

CHUNK_BYTES = 16 * 2**20
"""Largest chunk: what a save or a restore needs beside the state, and what a reader must read to check any part of it."""


@dataclass(frozen=True)
class Written:
    """What one rank wrote."""

    manifest: FileRef
    data_bytes: int


def fragments_to_write(fragments: Iterable[Fragment], rank: int, world_size: int) -> list[Fragment]:
    """What this rank writes of what it holds: all that it alone holds, and its share of what every rank holds.

    Returns:
        Fragments that, over all ranks, hold every element once.
    """
    held = list(fragments)
    alone = [fragment for fragment in held if not fragment.replicated]
    replicated = [fragment for fragment in held if fragment.replicated]
    for index, start, numel in share([fragment.numel for fragment in replicated], rank, world_size):
        whole = replicated[index]
        alone.append(replace(whole, start=whole.start + start, view=whole.view.narrow(0, start, numel), replicated=False))
    return alone


def write_rank(
    directory: Path,
    rank: int,
    fragments: Sequence[Fragment],
    scalars: list[Scalar],
    meta: dict[str, Any],
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> Written:
    """Write the data file and the manifest of this rank, both synced to the disk.

    Host memory needed beside the state: one chunk, where the state is not on the host.

    Raises:
        OSError: a write failed; a full disk shows before the first byte is written.
    """
    pieces: list[tuple[Fragment, int, int, int]] = []
    offset = 0
    for fragment in fragments:
        item_bytes = ITEM_BYTES[fragment.tensor.dtype]
        for start, numel in split(0, fragment.numel, chunk_bytes // item_bytes):
            pieces.append((fragment, start, numel, offset))
            offset += -(-numel * item_bytes // ALIGN_BYTES) * ALIGN_BYTES
    chunks = []
    with new_file(directory / data_name(rank), offset) as descriptor:
        for fragment, start, numel, at in pieces:
            data = host_bytes(fragment.view.narrow(0, start, numel))
            write_at(descriptor, data, at)
            chunks.append(
                Chunk(
                    fragment.tensor,
                    fragment.box,
                    fragment.start + start,
                    numel,
                    data_name(rank),
                    at,
                    len(data),
                    digest(data),
                )
            )
    manifest = dump_manifest(Manifest(rank, data_name(rank), offset, chunks, scalars, meta))
    write_durably(directory / manifest_name(rank), manifest)
    return Written(FileRef(manifest_name(rank), len(manifest), digest(manifest)), offset)


def host_bytes(view: torch.Tensor) -> memoryview:
    """The bytes of a flat tensor; copied only where it is not on the host already."""
    return view.detach().cpu().contiguous().view(torch.uint8).numpy().data


def file_bytes(path: Path) -> int:
    """Size of a file as the file system has it."""
    return os.stat(path).st_size
