"""How tensor parallelism cuts one parameter: pure arithmetic, no torch.

A parameter is cut along one dim. That dim is a row of blocks (queries, keys and values of a fused projection are three),
each cut by itself into whole units (a head, say), so that a rank holds one box of the global tensor per block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from anyshard.configs.errors import Problem

Box = tuple[tuple[int, int], ...]
"""One `(start, stop)` per dim of the global tensor."""


@dataclass(frozen=True)
class Block:
    """A run of the dim that is cut by itself.

    Attributes:
        size: elements along the dim.
        unit: elements that stay together. Ranks get whole units, the first ones one more where they do not divide.
        fine: what units may be cut into where there are more ranks than units (query heads of a key-value head).
        shared: where there are more ranks than units, several ranks hold the same unit (a key-value head).
    """

    size: int
    unit: int = 1
    fine: int | None = None
    shared: bool = False

    @property
    def num_units(self) -> int:
        """Units of the block."""
        return self.size // self.unit

    def can(self, tp: int) -> bool:
        """Whether `tp` ranks can share the block, none of them left without a part."""
        if self.size % self.unit:
            return False
        if self.num_units >= tp:
            return True
        if tp % self.num_units:
            return False
        return self.shared or (self.fine is not None and (self.size // self.fine) % tp == 0)

    def interval(self, tp: int, rank: int) -> tuple[int, int]:
        """`(start, stop)` of a rank, counted from the start of the block; `can(tp)` must hold."""
        units = self.num_units
        if units >= tp:
            each, more = divmod(units, tp)
            start = rank * each + min(rank, more)
            return start * self.unit, (start + each + (rank < more)) * self.unit
        if self.shared:
            start = rank * units // tp * self.unit
            return start, start + self.unit
        each = self.size // tp
        return rank * each, (rank + 1) * each

    def holders(self, tp: int, rank: int) -> tuple[int, ...]:
        """The ranks that hold the same part as `rank`, itself included."""
        if self.num_units >= tp or not self.shared:
            return (rank,)
        each = tp // self.num_units
        first = rank // each * each
        return tuple(range(first, first + each))


@dataclass(frozen=True)
class Split:
    """How one parameter is cut: along `dim`, block by block."""

    dim: int
    blocks: tuple[Block, ...]

    def boxes(self, shape: Sequence[int], tp: int, rank: int) -> list[Box]:
        """What a rank holds of a parameter of this global shape: one box per block."""
        found: list[Box] = []
        offset = 0
        for block in self.blocks:
            start, stop = block.interval(tp, rank)
            box = [(0, size) for size in shape]
            box[self.dim] = (offset + start, offset + stop)
            found.append(tuple(box))
            offset += block.size
        return found

    def sizes(self, tp: int) -> list[int]:
        """Elements along the dim that each rank holds."""
        intervals = [[block.interval(tp, rank) for block in self.blocks] for rank in range(tp)]
        return [sum(stop - start for start, stop in each) for each in intervals]

    def can(self, tp: int) -> bool:
        """Whether `tp` ranks can share the parameter."""
        return all(block.can(tp) for block in self.blocks)


def valid_degrees(splits: Sequence[Split], up_to: int) -> list[int]:
    """The degrees from 1 to `up_to` that every split allows."""
    return [tp for tp in range(1, up_to + 1) if all(split.can(tp) for split in set(splits))]


def split_problems(refused: str | None, splits: list[tuple[str, Split]], tp: int, model_name: str) -> Iterator[Problem]:
    """Why parameters with these splits cannot be divided over `tp` ranks; names the degrees that they can."""
    if tp == 1:
        return
    if refused is not None:
        fix = "Set parallel.tp=1, or describe its layers in parallel/plans/ (docs/parallelism.md says how)."
        yield Problem("parallel.tp", tp, f"the model {model_name} cannot be split: {refused}", fix)
        return
    for name, split in splits:
        if not split.can(tp):
            valid = ", ".join(map(str, valid_degrees([each for _, each in splits], 64)))
            blocks = " + ".join(f"{block.num_units} x {block.unit}" for block in split.blocks)
            reason = f"{name} has {blocks} along dim {split.dim}, which {tp} ranks cannot share."
            yield Problem("parallel.tp", tp, reason, f"The model {model_name} can be split into {valid}.")
            return
