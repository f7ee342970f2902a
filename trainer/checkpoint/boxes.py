"""Interval and box algebra of row-major tensors (pure: numpy and integers only).

A rank holds, of each global tensor, a *box* (one `(start, stop)` per dim: what tensor parallelism cuts) and, inside the
box, a *flat interval* of its row-major elements (what ZeRO cuts). Everything that moves between layouts is the
intersection of two such pieces. Used by the writer, the reader and the checks of a manifest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Box = tuple[tuple[int, int], ...]
"""One `(start, stop)` per dim of the global tensor."""


def full_box(shape: Sequence[int]) -> Box:
    """The box that is the whole tensor."""
    return tuple((0, size) for size in shape)


def box_numel(box: Box) -> int:
    """Number of elements in a box; 1 for the box of a scalar."""
    return math.prod(stop - start for start, stop in box)


def share(lengths: Sequence[int], rank: int, world_size: int) -> list[tuple[int, int, int]]:
    """The part of replicated tensors that `rank` writes: `(index, start, numel)`, contiguous and balanced.

    The tensors are laid end to end and the line is cut into `world_size` equal parts, so that together the ranks write
    every element once, and a tensor is cut in as few places as possible.
    """
    total = sum(lengths)
    begin, end = total * rank // world_size, total * (rank + 1) // world_size
    pieces, offset = [], 0
    for index, length in enumerate(lengths):
        start, stop = max(begin - offset, 0), min(end - offset, length)
        if start < stop:
            pieces.append((index, start, stop - start))
        offset += length
    return pieces


def split(start: int, numel: int, limit: int) -> list[tuple[int, int]]:
    """Cut the interval into `(start, numel)` pieces of at most `limit` elements."""
    return [(begin, min(limit, start + numel - begin)) for begin in range(start, start + numel, limit)]


def uncovered(pieces: Iterable[tuple[int, int]], length: int) -> tuple[int, int, str] | None:
    """Where `(start, numel)` pieces fail to cover `[0, length)` exactly once.

    Returns:
        None, or `(start, stop, "missing" | "twice" | "outside")` of the first such range.
    """
    reached = 0
    for start, numel in sorted(pieces):
        if start + numel > length or start < 0:
            return (start, start + numel, "outside")
        if start > reached:
            return (reached, start, "missing")
        if start < reached and numel:
            return (start, min(reached, start + numel), "twice")
        reached = max(reached, start + numel)
    return (reached, length, "missing") if reached < length else None


def runs(source_box: Box, source: tuple[int, int], target_box: Box, target: tuple[int, int]) -> NDArray[np.int64]:
    """What two pieces of the same global tensor have in common, as runs that are contiguous in both.

    Args:
        source: `(start, numel)` of the flat interval inside `source_box`; likewise `target`.

    Returns:
        Rows `(source offset, target offset, numel)`; offsets count elements from the start of each *interval*.
    """
    if source_box == target_box:
        begin = max(source[0], target[0])
        numel = min(source[0] + source[1], target[0] + target[1]) - begin
        return _rows([(begin - source[0], begin - target[0], numel)] if numel > 0 else [])
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(source_box, target_box, strict=True))
    if any(start >= stop for start, stop in common):
        return _rows([])
    # A run is the common part of the trailing dims that are whole in both boxes, and of the one dim before them.
    inner = len(common) - 1
    while inner > 0 and common[inner] == source_box[inner] == target_box[inner]:
        inner -= 1
    run_numel = box_numel(common[inner:])
    heads_in_source = _row_starts(common, source_box, inner) - source[0]
    heads_in_target = _row_starts(common, target_box, inner) - target[0]
    # clip every run to both intervals
    skip = np.maximum(0, np.maximum(-heads_in_source, -heads_in_target))
    stop = np.minimum(run_numel, np.minimum(source[1] - heads_in_source, target[1] - heads_in_target))
    keep = stop > skip
    return np.stack([heads_in_source + skip, heads_in_target + skip, stop - skip], axis=1)[keep]


def _row_starts(common: Box, box: Box, inner: int) -> NDArray[np.int64]:
    """Flat offset inside `box` of the first element of each run of `common`, in row-major order."""
    sizes = [stop - start for start, stop in box]
    strides = [math.prod(sizes[dim + 1 :]) for dim in range(len(sizes))]
    offsets = np.array([(common[inner][0] - box[inner][0]) * strides[inner]], dtype=np.int64)
    for dim in range(inner - 1, -1, -1):
        index = np.arange(common[dim][0] - box[dim][0], common[dim][1] - box[dim][0], dtype=np.int64) * strides[dim]
        offsets = (index[:, None] + offsets[None, :]).reshape(-1)
    return offsets


def _rows(rows: list[tuple[int, int, int]]) -> NDArray[np.int64]:
    return np.array(rows, dtype=np.int64).reshape(-1, 3)
