"""How long the parts of a model take, measured on this device: for `parallel.pp_balance=time`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from anyshard.configs import schema
from anyshard.parallel.pipeline import Batch, Stage, keep_stage
from anyshard.parallel.stages import Costs, Division, Stages
from anyshard.trainer.models.fill import Filler

REPEATS = 3


def measure(
    make: Callable[[], PreTrainedModel],
    division: Division,
    config: schema.Config,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> Costs:
    """Nanoseconds of a forward and backward pass of one micro-batch: the mean over all ranks, the same on each.

    Layers that are alike (by the shapes of their parameters and their type) are measured once. Memory: the largest of one
    layer, one layer with the embedding and one with the head, with gradients and activations.

    Args:
        make: makes the whole model on the meta device.

    Collective: every rank calls it; it blocks.
    """

    def seconds(bounds: tuple[int, ...], stage: int) -> float:
        return _seconds(make(), Stages(division, bounds), stage, config, device, dtype)

    kinds = _kinds(make(), division)
    count = len(kinds)
    alone = {kind: seconds((0, kinds.index(kind), kinds.index(kind) + 1, count), 1) for kind in dict.fromkeys(kinds)}
    layers = [alone[kind] for kind in kinds]
    first = seconds((0, 1, count), 0) - layers[0]
    last = seconds((0, count - 1, count), 1) - layers[-1]
    nanoseconds = torch.tensor([*layers, max(first, 0.0), max(last, 0.0)], dtype=torch.float64) * 1e9
    nanoseconds = nanoseconds.round().long().to(device)
    dist.all_reduce(nanoseconds)
    *times, begin, end = (nanoseconds // dist.get_world_size()).tolist()
    return Costs(tuple(times), begin, end)


def _kinds(model: PreTrainedModel, division: Division) -> list[object]:
    """What tells the layers of a model apart."""
    types = getattr(model.config.get_text_config(), "layer_types", None)
    layers = model.get_submodule(division.layers).children()
    shapes = [tuple((name, tuple(param.shape)) for name, param in layer.named_parameters()) for layer in layers]
    return [(shape, types[number] if types else None) for number, shape in enumerate(shapes)]


def _seconds(
    model: PreTrainedModel, stages: Stages, number: int, config: schema.Config, device: torch.device, dtype: torch.dtype
) -> float:
    """The shortest of some passes through one stage, after one that counts for nothing; draws no random numbers of the run."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        keep_stage(model, stages, number)
        filler = Filler(model, device=device, dtype=dtype, partition=None)
        filler.init(filler.slots, config.seed)
        model.train()
        stage = Stage(model, first=number == 0, last=number == stages.num_stages - 1)
        shape = (config.train.micro_batch_size, config.data.sequence_length)
        text = model.config.get_text_config()
        ids_BS = torch.randint(0, text.vocab_size, shape, device=device)
        hidden = ids_BS if number == 0 else torch.randn(*shape, text.hidden_size, device=device, dtype=dtype)
        took = []
        for _ in range(1 + REPEATS):
            _wait(device)
            started = time.perf_counter()
            output = stage.run(hidden if number == 0 else hidden.requires_grad_(), {"input_ids": ids_BS}, _loss)
            torch.autograd.backward(output, torch.ones_like(output))
            _wait(device)
            took.append(time.perf_counter() - started)
    return min(took[1:])


def _loss(model: Any, batch: Batch) -> torch.Tensor:
    logits_BSV = model(**batch, use_cache=False).logits
    return nn.functional.cross_entropy(logits_BSV.float().flatten(0, 1), batch["input_ids"].flatten())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
