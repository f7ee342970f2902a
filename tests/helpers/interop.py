"""Checkpoints of small Hugging Face models without an engine: for the tests of other formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from helpers.checkpoints import Values, a_commit, fragments_of
from helpers.models import small_config
from transformers import PreTrainedModel

from anyshard.trainer.checkpoint import layout
from anyshard.trainer.checkpoint.catalog import checkpoint_name
from anyshard.trainer.checkpoint.manifest import COMMIT, Scalar, dump_commit
from anyshard.trainer.checkpoint.writer import fragments_to_write, write_rank
from anyshard.trainer.models.describe import describe_model
from anyshard.trainer.models.hf import build

FAMILIES = ["llama", "gpt2", "qwen3", "mixtral"]


def small_model(family: str, seed: int = 42) -> PreTrainedModel:
    """A small model with random weights; qwen3 and gpt2 tie their embeddings, mixtral stores its experts apart."""
    return build(small_config(family, seed=seed), device=torch.device("cpu"), dtype=torch.float32).eval()


def values_of(model: torch.nn.Module, *, states: bool = True) -> Values:
    """Everything that a checkpoint of the model holds, with made-up Adam states."""
    generator = torch.Generator().manual_seed(1)
    values: Values = {}
    for param, name in layout.parameters(model).items():
        values[name, "param"] = param.detach().clone()
        if states and param.requires_grad:
            values[name, "exp_avg"] = torch.randn(param.shape, generator=generator)
            values[name, "exp_avg_sq"] = torch.rand(param.shape, generator=generator)
    return values | {(name, "buffer"): buffer for name, buffer in layout.persistent_buffers(model).items()}


def write_model(
    directory: Path, model: torch.nn.Module, *, step: int = 5, world_size: int = 2, states: bool = True, **changes: Any
) -> Path:
    """A committed checkpoint of `model`, as ranks at ZeRO 0 would write it."""
    path = directory / checkpoint_name(step)
    path.mkdir(parents=True)
    values, refs = values_of(model, states=states), []
    for rank in range(world_size):
        mine = fragments_to_write(fragments_of(values), rank, world_size)
        stepped = tuple(dict.fromkeys(each.tensor.name for each in mine if each.tensor.key == "exp_avg"))
        scalars = [Scalar("step", "float32", float(step), stepped)] if stepped else []
        refs.append(write_rank(path, rank, mine, scalars, {"rank": rank}, chunk_bytes=8192).manifest)
    fields = {
        "tied": layout.tied_names(model),
        "meta": {"step": step, "samples": 8 * step, "tokens": 100 * step, "model": describe_model(model)},
        "engine": {"global_steps": step, "skipped_steps": 0, "optimizer_steps": step, "loss_scaler": None},
        "optimizer": {
            "class": "AdamW",
            "kind": "adam",
            "groups": {"decay": {"lr": 0.1, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}},
        },
        **changes,
    }
    (path / COMMIT).write_bytes(dump_commit(a_commit(step=step, manifests=refs, **fields)))
    return path


def silent(done: int, total: int) -> None:
    """A report that nobody reads."""
    assert 0 <= done <= total
