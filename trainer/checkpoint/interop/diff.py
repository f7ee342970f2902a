"""Two checkpoints tensor by tensor, whatever layout or format either has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from anyshard.trainer.checkpoint.interop.source import Key, Source
from anyshard.trainer.checkpoint.manifest import BUFFER, ITEM_BYTES, PARAM, Tensor

_SLICE_NUMEL = 2**22


@dataclass(frozen=True)
class Difference:
    """One tensor or setting that differs.

    Attributes:
        what: "only in a", "only in b", "shape", "dtype" or "bits" (the values are equal: 0.0 and -0.0), "values" or "setting".
        max_abs: largest |a - b|; None where it cannot be said.
        max_rel: largest |a - b| / max(|a|, |b|).
        num_different: elements whose values differ.
    """

    name: str
    key: str
    what: str
    a: Any = None
    b: Any = None
    max_abs: float | None = None
    max_rel: float | None = None
    num_different: int | None = None


def diff(a: Source, b: Source, *, weights_only: bool, report: Callable[[int, int], None]) -> dict[str, Any]:
    """Compare parameters, buffers and, unless `weights_only`, optimizer states, scalars, hyper-parameters and the step.

    Memory: two tensors.

    Returns:
        num_tensors, num_equal (bit for bit), num_bytes, differences.

    Raises:
        CheckpointError: one of them is damaged.
    """
    keys = [key for key in dict.fromkeys([*a.tensors, *b.tensors]) if not weights_only or key[1] in (PARAM, BUFFER)]
    total = sum(_nbytes(source.tensors[key]) for key in keys for source in (a, b) if key in source.tensors)
    found, done = [], 0
    for key in keys:
        difference = _compare(a, b, key)
        found += [difference] if difference else []
        done += sum(_nbytes(source.tensors[key]) for source in (a, b) if key in source.tensors)
        report(done, total)
    num_equal = len(keys) - len(found)
    if not weights_only:
        found += _settings(a, b)
    differences = [{name: value for name, value in asdict(each).items() if value is not None} for each in found]
    return {"a": str(a.path), "b": str(b.path), "num_tensors": len(keys), "num_equal": num_equal, "differences": differences}


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel * ITEM_BYTES[tensor.dtype]


def _compare(a: Source, b: Source, key: Key) -> Difference | None:
    left, right = a.tensors.get(key), b.tensors.get(key)
    if left is None or right is None:
        return Difference(*key, what="only in a" if right is None else "only in b")
    if left.shape != right.shape:
        return Difference(*key, what="shape", a=list(left.shape), b=list(right.shape))
    cast = left.dtype != right.dtype
    types: tuple[str | None, str | None] = (left.dtype, right.dtype) if cast else (None, None)
    max_abs, max_rel, num_different, same_bits = 0.0, 0.0, 0, not cast
    for x, y in zip(_slices(a.read(key)), _slices(b.read(key)), strict=True):
        if same_bits and _bits_equal(x, y):
            continue
        same_bits = False
        differs, distance, relative = _distance(x, y)
        num_different, max_abs, max_rel = num_different + differs, max(max_abs, distance), max(max_rel, relative)
    if same_bits:
        return None
    if not num_different:
        return Difference(*key, "dtype" if cast else "bits", *types)
    return Difference(*key, "values", *types, max_abs, max_rel, num_different)


def _slices(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.split(tensor.reshape(-1), _SLICE_NUMEL) if tensor.numel() else ()


def _bits_equal(x: torch.Tensor, y: torch.Tensor) -> bool:
    return torch.equal(x.view(torch.uint8), y.view(torch.uint8))


def _distance(x: torch.Tensor, y: torch.Tensor) -> tuple[int, float, float]:
    """Elements that differ, largest absolute and largest relative distance; a NaN is equal to a NaN alone."""
    wide = torch.complex128 if x.is_complex() or y.is_complex() else torch.float64
    p, q = x.to(wide), y.to(wide)
    differs = (p != q) & ~(p.isnan() & q.isnan())
    p, q = p[differs], q[differs]
    if not len(p):
        return 0, 0.0, 0.0
    distance = (p - q).abs().nan_to_num(nan=float("inf"))
    relative = (distance / torch.maximum(p.abs(), q.abs())).nan_to_num(nan=float("inf"))
    return len(p), distance.max().item(), relative.max().item()


def _settings(a: Source, b: Source) -> list[Difference]:
    left, right = _flat(a), _flat(b)
    return [
        Difference(name, key, "setting", a=left.get((name, key)), b=right.get((name, key)))
        for name, key in dict.fromkeys([*left, *right])
        if left.get((name, key)) != right.get((name, key))
    ]


def _flat(source: Source) -> dict[Key, Any]:
    """Step, hyper-parameters and scalar states of a checkpoint."""
    record = source.record
    found: dict[Key, Any] = {("run", "step"): record.step, ("optimizer", "kind"): record.optimizer.get("kind")}
    for name, settings in record.optimizer.get("groups", {}).items():
        found |= {(f"group {name}", key): value for key, value in settings.items()}
    for scalar in record.scalars:
        found |= {(name, scalar.key): float(scalar.value) for name in scalar.names}
    return found
