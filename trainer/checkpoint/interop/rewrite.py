"""Any source written as a checkpoint of ours, in the present version, one tensor at a time."""

from __future__ import annotations

import contextlib
import datetime
import platform
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import anyshard
from anyshard.configs.errors import ConfigError, Problem
from anyshard.trainer.checkpoint import catalog
from anyshard.trainer.checkpoint.boxes import full_box, share, split
from anyshard.trainer.checkpoint.interop.output import new_folder
from anyshard.trainer.checkpoint.interop.source import Key, Record, Source, host_bytes, num_bytes
from anyshard.trainer.checkpoint.manifest import (
    ALIGN_BYTES,
    BUFFER,
    COMMIT,
    ITEM_BYTES,
    PARAM,
    Chunk,
    Commit,
    FileRef,
    Manifest,
    Scalar,
    Tensor,
    data_name,
    digest,
    dump_commit,
    dump_manifest,
    manifest_name,
)
from anyshard.trainer.checkpoint.storage import new_file, write_at, write_durably
from anyshard.trainer.checkpoint.writer import CHUNK_BYTES

Piece = tuple[int, int, int]
"""First element, number of elements, offset in the file."""


def write_checkpoint(
    source: Source,
    out: Path,
    *,
    num_files: int,
    rank_meta: Sequence[dict[str, Any]] | None,
    report: Callable[[int, int], None],
) -> dict[str, Any]:
    """Write everything that `source` holds; `out` becomes the checkpoint's directory.

    Memory: one tensor.

    Args:
        num_files: data files, as many as ranks would write.
        rank_meta: of each file; None: there is none.
        report: called with (bytes written, bytes to write).

    Returns:
        What was written, for people.

    Raises:
        ConfigError: `out` is occupied, or has the name of the checkpoint of another step.
        CheckpointError: the source is damaged.
    """
    record = source.record
    if catalog.step_of(out) not in (None, record.step):
        reason = f"this is the name of another step's checkpoint; the source is of step {record.step}."
        raise ConfigError(Problem("OUT", out, reason, f"Name it {catalog.checkpoint_name(record.step)}, or anything else."))
    plans, sizes = _plan(list(source.tensors.values()), num_files)
    total, done = num_bytes(source.tensors), 0
    chunks: list[list[Chunk]] = [[] for _ in range(num_files)]
    with new_folder(out) as folder:
        with contextlib.ExitStack() as files:
            open_files = [files.enter_context(new_file(folder / data_name(rank), size)) for rank, size in enumerate(sizes)]
            for key, tensor in source.tensors.items():
                flat = source.read(key).reshape(-1)
                for rank, pieces in enumerate(plans):
                    chunks[rank] += [_put(open_files[rank], data_name(rank), tensor, flat, piece) for piece in pieces[key]]
                done += flat.numel() * flat.element_size()
                del flat
                report(done, total)
        refs = []
        for rank, mine in enumerate(chunks):
            meta = rank_meta[rank] if rank_meta else {}
            manifest = dump_manifest(Manifest(rank, data_name(rank), sizes[rank], mine, _scalars(record, mine), meta))
            write_durably(folder / manifest_name(rank), manifest)
            refs.append(FileRef(manifest_name(rank), len(manifest), digest(manifest)))
        write_durably(folder / COMMIT, dump_commit(_commit(record, refs)))
    return {
        "out": str(out),
        "from": source.format,
        "step": record.step,
        "tensors": len(source.tensors),
        "data_files": num_files,
        "notes": record.notes,
    }


def _plan(tensors: Sequence[Tensor], num_files: int) -> tuple[list[dict[Key, list[Piece]]], list[int]]:
    """For each file the pieces of each tensor, and its size; the files are equally large."""
    plans, sizes = [], []
    for rank in range(num_files):
        plan: dict[Key, list[Piece]] = defaultdict(list)
        offset = 0
        for index, start, numel in share([tensor.numel for tensor in tensors], rank, num_files):
            tensor = tensors[index]
            item_bytes = ITEM_BYTES[tensor.dtype]
            for begin, length in split(start, numel, CHUNK_BYTES // item_bytes):
                plan[tensor.name, tensor.key].append((begin, length, offset))
                offset += -(-length * item_bytes // ALIGN_BYTES) * ALIGN_BYTES
        plans.append(plan)
        sizes.append(offset)
    return plans, sizes


def _put(descriptor: int, file: str, tensor: Tensor, flat: torch.Tensor, piece: Piece) -> Chunk:
    start, numel, offset = piece
    data = host_bytes(flat.narrow(0, start, numel))
    write_at(descriptor, data, offset)
    return Chunk(tensor, full_box(tensor.shape), start, numel, file, offset, len(data), digest(data))


def _scalars(record: Record, chunks: Sequence[Chunk]) -> list[Scalar]:
    """Those of the parameters whose states are in these chunks."""
    here = {chunk.tensor.name for chunk in chunks if chunk.tensor.key not in (PARAM, BUFFER)}
    mine = [Scalar(s.key, s.kind, s.value, tuple(name for name in s.names if name in here)) for s in record.scalars]
    return [scalar for scalar in mine if scalar.names]


def _commit(record: Record, refs: list[FileRef]) -> Commit:
    return Commit(
        step=record.step,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        layout={**record.layout, "world_size": len(refs)},
        versions={
            "anyshard": anyshard.__version__,
            "torch": torch.__version__,
            "deepspeed": version("deepspeed"),
            "python": platform.python_version(),
        },
        engine=record.engine,
        optimizer=record.optimizer,
        tied=record.tied,
        meta=record.meta,
        manifests=refs,
    )
