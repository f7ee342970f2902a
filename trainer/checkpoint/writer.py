"""One rank's files of a checkpoint: its fragments in one sequential data file, and the manifest that lists them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyshard.trainer.checkpoint.boxes import share
from anyshard.trainer.checkpoint.layout import Fragment
from anyshard.trainer.checkpoint.manifest import (
    Chunk,
    FileRef,
    Manifest,
    Scalar,
    data_name,
    digest,
    dump_manifest,
    manifest_name,
)
from anyshard.trainer.checkpoint.snapshot import FilePlan, Filled, Snapshot
from anyshard.trainer.checkpoint.staging import StagingPool
from anyshard.trainer.checkpoint.store import Store, store_of

CHUNK_BYTES = 16 * 2**20
"""Largest chunk: what a restore needs beside the state, and what a reader must read to check any part of it."""


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
        view = whole.view.narrow(0, start, numel)
        alone.append(dataclasses.replace(whole, start=whole.start + start, view=view, replicated=False))
    return alone


def write_blocks(
    directory: Path,
    rank: int,
    num_bytes: int,
    blocks: Iterable[Filled],
    scalars: list[Scalar],
    meta: dict[str, Any],
    *,
    store: Store,
    after_block: Callable[[int], None] | None = None,
) -> Written:
    """Write the data file of this rank from copied blocks, hashing on the way, then its manifest; both synced to the disk.

    Args:
        num_bytes: of the data file.
        blocks: in order; each is used until the next is asked for.
        after_block: called with the bytes of every block written.

    Raises:
        OSError: a write failed; a full disk shows before the first byte is written.
    """
    chunks, file = [], data_name(rank)
    with store.data_file(directory / file, num_bytes) as write:
        for filled in blocks:
            for piece in filled.pieces:
                fragment, checksum = piece.fragment, digest(filled.bytes_of(piece))
                start = fragment.start + piece.start
                chunks.append(
                    Chunk(fragment.tensor, fragment.box, start, piece.numel, file, piece.offset, piece.nbytes, checksum)
                )
            write(filled.data, filled.offset)
            if after_block is not None:
                after_block(filled.num_bytes)
    manifest = dump_manifest(Manifest(rank, file, num_bytes, chunks, scalars, meta))
    store.write(directory / manifest_name(rank), manifest)
    return Written(FileRef(manifest_name(rank), len(manifest), digest(manifest)), num_bytes)


def write_rank(
    directory: Path,
    rank: int,
    fragments: Sequence[Fragment],
    scalars: list[Scalar],
    meta: dict[str, Any],
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> Written:
    """Write the data file and the manifest of this rank from live fragments, by this thread alone.

    Host memory needed beside the state: one block.

    Raises:
        OSError: a write failed; a full disk shows before the first byte is written.
    """
    pool = StagingPool(1)
    snapshot = Snapshot(FilePlan.of(fragments, chunk_bytes, pool.block_bytes), pool)
    return write_blocks(directory, rank, snapshot.num_bytes, snapshot.blocks_here(), scalars, meta, store=store_of(directory))


def file_bytes(path: Path) -> int:
    """Size of a file as its storage has it."""
    return path.stat().st_size
