"""Layouts without engines: which piece of every global tensor each rank would hold, for any (dp, tp, pp, ZeRO stage).

The cuts are those of the engines: ZeRO 1 and 2 lay the shards of a group end to end, pad, and cut the line in dp parts; ZeRO 3
cuts every shard in dp equal parts, the last one short; tensor parallelism cuts boxes (columns, rows, whole key-value heads);
pipeline stages hold the layers in turn, and the tied embedding is on the first and the last.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from helpers.checkpoints import Values, a_commit

from anyshard.trainer.checkpoint.boxes import Box, box_numel, full_box
from anyshard.trainer.checkpoint.catalog import checkpoint_name
from anyshard.trainer.checkpoint.layout import Fragment
from anyshard.trainer.checkpoint.manifest import COMMIT, Scalar, Tensor, dump_commit
from anyshard.trainer.checkpoint.writer import fragments_to_write, write_rank

NUM_LAYERS = 4
HIDDEN, HEADS, KV_HEADS, INTERMEDIATE, VOCAB = 24, 4, 2, 44, 51
PAD_TO = 8  # elements; DeepSpeed pads groups to its alignment


@dataclass(frozen=True)
class Layout:
    """A point of the matrix."""

    dp: int
    tp: int = 1
    pp: int = 1
    zero: int = 0

    @property
    def world_size(self) -> int:
        return self.dp * self.tp * self.pp

    def __str__(self) -> str:
        return f"dp{self.dp}tp{self.tp}pp{self.pp}z{self.zero}"

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(dp rank, tp rank, stage) of a rank: tp fastest, then dp, then pp."""
        return rank // self.tp % self.dp, rank % self.tp, rank // (self.tp * self.dp)


@dataclass(frozen=True)
class Param:
    """A parameter of the simulated model.

    Attributes:
        layers: whose pipeline stages hold it.
        cut: dim that tensor parallelism cuts; None for what every tp rank holds.
        unit: elements of that dim that stay together: a head.
    """

    shape: tuple[int, ...]
    layers: tuple[int, ...]
    cut: int | None = None
    unit: int = 1
    decay: bool = True
    frozen: bool = False


def model() -> dict[str, Param]:
    """A small Llama: grouped-query attention, sizes that nothing divides, tied embedding, one frozen matrix, two groups."""
    head = HIDDEN // HEADS
    params = {"embed": Param((VOCAB, HIDDEN), (0, NUM_LAYERS - 1), cut=0)}
    for layer in range(NUM_LAYERS):
        here = (layer,)
        params |= {
            f"layers.{layer}.norm": Param((HIDDEN,), here, decay=False),
            f"layers.{layer}.q": Param((HEADS * head, HIDDEN), here, cut=0, unit=head),
            f"layers.{layer}.k": Param((KV_HEADS * head, HIDDEN), here, cut=0, unit=head),
            f"layers.{layer}.o": Param((HIDDEN, HEADS * head), here, cut=1, unit=head),
            f"layers.{layer}.up": Param((INTERMEDIATE, HIDDEN), here, cut=0),
            f"layers.{layer}.down": Param((HIDDEN, INTERMEDIATE), here, cut=1),
            f"layers.{layer}.bias": Param((1,), here, decay=False),
        }
    params["layers.1.up"] = Param((INTERMEDIATE, HIDDEN), (1,), cut=0, frozen=True)
    params["final_norm"] = Param((HIDDEN,), (NUM_LAYERS - 1,), decay=False)
    return params


MODEL = model()
STATES = ("param", "exp_avg", "exp_avg_sq")


def values(seed: int) -> Values:
    """The global state of the whole model."""
    generator = torch.Generator().manual_seed(seed)
    return {
        (name, key): torch.randn(param.shape, generator=generator)
        for name, param in MODEL.items()
        for key in (("param",) if param.frozen else STATES)
    }


def shard(param: Param, tp_rank: int, tp: int) -> Box | None:
    """The box of a tp rank; None when it holds nothing. Where there are fewer heads than ranks, several hold the same."""
    box = list(full_box(param.shape))
    if param.cut is not None:
        units = param.shape[param.cut] // param.unit
        parts = min(tp, units)
        part = tp_rank * parts // tp
        begin, end = units * part // parts, units * (part + 1) // parts
        box[param.cut] = (begin * param.unit, end * param.unit)
    return tuple(box) if box_numel(tuple(box)) else None


def stage_of(layer: int, pp: int) -> int:
    """The pipeline stage of a layer."""
    return layer * pp // NUM_LAYERS


Piece = tuple[str, Box, int, int]
"""(name, box, first element inside the box, number of elements)."""


def pieces(layout: Layout, rank: int) -> list[Piece]:
    """What a rank holds of every parameter, and of its states."""
    dp_rank, tp_rank, stage = layout.coordinates(rank)
    shards = [
        (name, box)
        for name, param in MODEL.items()
        if stage in {stage_of(layer, layout.pp) for layer in param.layers} and (box := shard(param, tp_rank, layout.tp))
    ]
    if layout.zero == 0:
        return [(name, box, 0, box_numel(box)) for name, box in shards]
    if layout.zero == 3:
        found = []
        for name, box in shards:
            size = -(-box_numel(box) // layout.dp)
            start = size * dp_rank
            if (numel := min(size, box_numel(box) - start)) > 0:
                found.append((name, box, start, numel))
        return found
    found = [(name, box, 0, box_numel(box)) for name, box in shards if MODEL[name].frozen]
    for decay in (True, False):
        group = [(name, box) for name, box in shards if MODEL[name].decay is decay and not MODEL[name].frozen]
        found += _flat_partition(group, dp_rank, layout.dp)
    return found


def _flat_partition(group: list[tuple[str, Box]], dp_rank: int, dp: int) -> Iterator[Piece]:
    padding = dp * PAD_TO
    total = -(-sum(box_numel(box) for _, box in group) // padding) * padding
    begin, end = total // dp * dp_rank, total // dp * (dp_rank + 1)
    offset = 0
    for name, box in group:
        numel = box_numel(box)
        start, stop = max(begin - offset, 0), min(end - offset, numel)
        if start < stop:
            yield name, box, start, stop - start
        offset += numel


def live(layout: Layout, rank: int, state: Values | None) -> list[Fragment]:
    """A rank's fragments, filled from the global state, or with NaN to be read into."""
    found = []
    for name, box, start, numel in pieces(layout, rank):
        for key in ("param",) if MODEL[name].frozen else STATES:
            if state is None:
                view = torch.full((numel,), math.nan)
            else:
                region = tuple(slice(begin, end) for begin, end in box)
                view = state[name, key][region].reshape(-1)[start : start + numel].clone()
            found.append(Fragment(Tensor(name, key, "float32", MODEL[name].shape), start, view, False, shard=box))
    return found


def save(layout: Layout, state: Values, directory: Path) -> Path:
    """A checkpoint as the ranks of a layout write it: those that hold the same piece share it."""
    path = directory / checkpoint_name(1)
    path.mkdir(parents=True)
    held = [live(layout, rank, state) for rank in range(layout.world_size)]
    holders: dict[Piece, list[int]] = defaultdict(list)
    for rank in range(layout.world_size):
        for piece in pieces(layout, rank):
            holders[piece].append(rank)
    refs = []
    for rank, fragments in enumerate(held):
        together: dict[tuple[int, ...], list[Fragment]] = defaultdict(list)
        for fragment in fragments:
            peers = holders[fragment.tensor.name, fragment.box, fragment.start, fragment.numel]
            together[tuple(peers)].append(Fragment(fragment.tensor, fragment.start, fragment.view, True, fragment.shard))
        mine = [
            fragment
            for peers, shared in together.items()
            for fragment in fragments_to_write(shared, peers.index(rank), len(peers))
        ]
        names = tuple(dict.fromkeys(fragment.tensor.name for fragment in mine if not MODEL[fragment.tensor.name].frozen))
        refs.append(write_rank(path, rank, mine, [Scalar("step", "float32", 4.0, names)], {}, chunk_bytes=1024).manifest)
    (path / COMMIT).write_bytes(dump_commit(a_commit(manifests=refs)))
    return path
