"""Filling a rank's live tensors from a checkpoint of any layout: only the chunks it needs, each checked as it is read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from anyshard.configs.errors import CheckpointError
from anyshard.trainer.checkpoint import catalog
from anyshard.trainer.checkpoint.boxes import runs
from anyshard.trainer.checkpoint.layout import Fragment
from anyshard.trainer.checkpoint.manifest import BUFFER, PARAM, Chunk, digest

ChunkIndex = Mapping[tuple[str, str], list[Chunk]]
Copies = list[tuple[Fragment, NDArray[np.int64]]]


def check_same_model(wanted: Mapping[tuple[str, str], tuple[int, ...]], stored: ChunkIndex) -> None:
    """Refuse the checkpoint of another model, naming the first tensor that differs in the order of this model.

    Args:
        wanted: (name, state key) -> global shape, of `layout.global_tensors`.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or is one that this model does not have.
    """
    reason = None
    for (name, key), shape in wanted.items():
        if (name, key) not in stored:
            reason = f"it has no {name} [{key}], which this model has with shape {shape}"
        elif stored[name, key][0].tensor.shape != shape:
            reason = f"its {name} has shape {stored[name, key][0].tensor.shape}, this model's has {shape}"
        if reason:
            break
    else:
        extra = [name for name, key in stored if key in (PARAM, BUFFER) and (name, key) not in wanted]
        if not extra:
            return
        reason = f"it holds {extra[0]}, which this model does not have"
    raise CheckpointError(f"The checkpoint is of another model: {reason}. Set the model it was trained with, or resume=never.")


def plan_reads(targets: Iterable[Fragment], stored: ChunkIndex) -> dict[str, list[tuple[Chunk, Copies]]]:
    """Which chunks to read from which file, in the order of the file, and where the parts of each go."""
    copies: dict[Chunk, Copies] = defaultdict(list)
    for target in targets:
        for chunk in stored[target.tensor.name, target.tensor.key]:
            rows = runs(chunk.box, (chunk.start, chunk.numel), target.box, (target.start, target.numel))
            if len(rows):
                copies[chunk].append((target, rows))
    by_file: dict[str, list[tuple[Chunk, Copies]]] = defaultdict(list)
    for chunk in sorted(copies, key=lambda chunk: (chunk.file, chunk.offset)):
        by_file[chunk.file].append((chunk, copies[chunk]))
    return dict(by_file)


@torch.no_grad()
def read_into(directory: Path, targets: Iterable[Fragment], stored: ChunkIndex, *, verify: bool) -> int:
    """Fill the targets; returns the number of bytes read. Host memory needed: one chunk.

    Args:
        verify: compare each chunk with its checksum before any of it is used.

    Raises:
        CheckpointError: a chunk is damaged; the message names file, offset and tensor.
    """
    num_bytes = 0
    for name, reads in plan_reads(targets, stored).items():
        with catalog.open_bytes(directory / name) as file:
            for chunk, copies in reads:
                buffer = bytearray(chunk.nbytes)
                file.seek(chunk.offset)
                read = _read_fully(file, memoryview(buffer))
                if read < chunk.nbytes or (verify and digest(buffer) != chunk.digest):
                    state = "the file ends early" if read < chunk.nbytes else "checksum mismatch"
                    raise CheckpointError(
                        f"{directory / name}, bytes {chunk.offset}..{chunk.offset + chunk.nbytes}, "
                        f"{chunk.tensor.name} [{chunk.tensor.key}]: {state}."
                    )
                source = torch.frombuffer(buffer, dtype=getattr(torch, chunk.tensor.dtype))
                for target, rows in copies:
                    for begin, into, numel in rows.tolist():
                        target.view.narrow(0, into, numel).copy_(source.narrow(0, begin, numel))
                num_bytes += chunk.nbytes
    return num_bytes


def _read_fully(file: object, buffer: memoryview) -> int:
    total = 0
    while total < len(buffer):
        read = file.readinto(buffer[total:])  # type: ignore[attr-defined]
        if not read:
            break
        total += read
    return total
