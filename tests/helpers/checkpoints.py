"""Checkpoints made without an engine, from plain tensors: for the tests of the format, the reader and retention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from anyshard.trainer.checkpoint.catalog import checkpoint_name
from anyshard.trainer.checkpoint.layout import Fragment, dtype_name
from anyshard.trainer.checkpoint.manifest import COMMIT, Commit, Scalar, Tensor, dump_commit
from anyshard.trainer.checkpoint.writer import fragments_to_write, write_rank

Values = dict[tuple[str, str], torch.Tensor]


def some_values(seed: int = 0) -> Values:
    """Tensors of several dtypes and shapes, one larger than a chunk of the tests."""
    generator = torch.Generator().manual_seed(seed)
    return {
        ("a.weight", "param"): torch.randn(7, 11, generator=generator),
        ("a.weight", "exp_avg"): torch.randn(7, 11, generator=generator),
        ("a.bias", "param"): torch.randn(5, generator=generator).bfloat16(),
        ("scalar", "param"): torch.randn((), generator=generator),
        ("seen", "buffer"): torch.arange(6).view(2, 3),
        ("mask", "buffer"): torch.tensor([True, False, True]),
    }


def fragments_of(values: Values) -> list[Fragment]:
    """Every tensor whole, as each rank holds it at ZeRO 0."""
    return [
        Fragment(Tensor(name, key, dtype_name(value.dtype), tuple(value.shape)), 0, value.view(-1), replicated=True)
        for (name, key), value in values.items()
    ]


def empty_like(values: Values) -> Values:
    """The same tensors, to be filled."""
    return {name: torch.zeros_like(value) for name, value in values.items()}


def write_checkpoint(
    directory: Path, values: Values, *, step: int = 1, world_size: int = 2, chunk_bytes: int = 64, **changes: Any
) -> Path:
    """A committed checkpoint of `values`, as `world_size` ranks would write it."""
    path = directory / checkpoint_name(step)
    path.mkdir(parents=True)
    refs = []
    for rank in range(world_size):
        mine = fragments_to_write(fragments_of(values), rank, world_size)
        scalars = [Scalar("step", "float32", 4.0, ("a.weight",))]
        refs.append(write_rank(path, rank, mine, scalars, {"rank": rank}, chunk_bytes=chunk_bytes).manifest)
    (path / COMMIT).write_bytes(dump_commit(a_commit(step=step, manifests=refs, **changes)))
    return path


def a_commit(**changes: Any) -> Commit:
    """A COMMIT record."""
    fields: dict[str, Any] = {
        "step": 1,
        "created": "2026-01-01T00:00:00+00:00",
        "layout": {"dp": 2, "zero": 0},
        "versions": {},
        "engine": {"global_steps": 1, "skipped_steps": 0, "optimizer_steps": 1, "loss_scaler": None},
        "optimizer": {"class": "AdamW", "kind": "adam", "groups": {"decay": {"lr": 0.1}}},
        "tied": {},
        "meta": {"tokens": 12},
        "manifests": [],
    }
    return Commit(**{**fields, **changes})
