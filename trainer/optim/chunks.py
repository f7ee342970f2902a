"""Cutting the tensors of an elementwise update, so that what it needs beside them stays small."""

from __future__ import annotations

from collections.abc import Iterator

import torch

CHUNK_ON_CPU, CHUNK = 1 << 18, 1 << 24
"""Elements updated at once: ZeRO makes one flat tensor of a group, and updates need temporaries; 1 MiB stays in the cache."""


def chunks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same parts of each, as views; all at once where one is not contiguous."""
    if all(tensor.is_contiguous() for tensor in tensors):
        size = CHUNK_ON_CPU if tensors[0].is_cpu else CHUNK
        yield from zip(*(torch.split(tensor.view(-1), size) for tensor in tensors), strict=True)
    else:
        yield tensors
