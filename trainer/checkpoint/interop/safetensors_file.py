"""Safetensors written one tensor at a time: the header is known before the first tensor is.

Source: https://huggingface.co/docs/safetensors (8 bytes of header length, JSON header, elements without gaps, little-endian).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from anyshard.configs.errors import CheckpointError
from anyshard.trainer.checkpoint.interop.source import host_bytes
from anyshard.trainer.checkpoint.manifest import ITEM_BYTES
from anyshard.trainer.checkpoint.storage import new_file, write_at

CODES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "complex64": "C64", "bool": "BOOL",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8",
}  # fmt: skip
_SLICE_NUMEL = 2**22  # elements that are cast at once


@dataclass(frozen=True)
class Entry:
    """A tensor that is going to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of its elements."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def shards(entries: Iterable[Entry], max_bytes: int) -> list[list[Entry]]:
    """Cut a list into files of at most `max_bytes`; a larger tensor has a file of its own."""
    files: list[list[Entry]] = []
    filled = 0
    for entry in entries:
        if not files or filled + entry.nbytes > max_bytes:
            files.append([])
            filled = 0
        files[-1].append(entry)
        filled += entry.nbytes
    return files


def write_file(path: Path, entries: Sequence[Entry], tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterable[int]:
    """Write the tensors, which come in the order of `entries`, cast to the types there; yields the bytes of each when written.

    Memory: the tensor at hand and a few MiB.

    Raises:
        CheckpointError: a type that the format does not know, or a tensor that is not the next entry.
        OSError: it could not be written; a full disk shows before the first tensor is read.
    """
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for entry in entries:
        if entry.dtype not in CODES:
            raise CheckpointError(f"{entry.name} is {entry.dtype}, which safetensors does not know. Set --dtype.")
        span = [offset, offset + entry.nbytes]
        header[entry.name] = {"dtype": CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": span}  # type: ignore[dict-item]
        offset = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = len(text).to_bytes(8, "little") + text
    with new_file(path, len(start) + offset) as descriptor:
        write_at(descriptor, memoryview(start), 0)
        at, coming = len(start), iter(tensors)
        for entry in entries:
            name, tensor = next(coming)
            if (name, tuple(tensor.shape)) != (entry.name, entry.shape):
                raise CheckpointError(f"{entry.name} of shape {entry.shape} came as {name} of {tuple(tensor.shape)}.")
            flat, dtype = tensor.reshape(-1), getattr(torch, entry.dtype)
            for piece in torch.split(flat, _SLICE_NUMEL) if flat.numel() else ():
                data = host_bytes(piece.to(dtype))
                write_at(descriptor, data, at)
                at += len(data)
            del tensor, flat
            yield entry.nbytes
