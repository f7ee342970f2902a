"""Pipeline parallelism: a stage of a Hugging Face model, run by the model's own forward, under DeepSpeed's pipeline engine.

A stage keeps the modules that `stages.yaml` gives it, under their own names, and has small stand-ins where the others were.
The model's own code then does the rest: rotary embeddings, masks (also of packed documents), per-layer types. Later stages are
given the hidden states as `inputs_embeds`; the last one runs the causal language model with its head, and the task's own loss.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from deepspeed.module_inject.layers import DS_TENSOR_MODEL_PARALLEL
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.pipe.topology import ProcessTopology
from torch import nn

from anyshard.configs.errors import ConfigError, Problem
from anyshard.configs.rules_pipeline import balance_problem
from anyshard.configs.schema import Parallel
from anyshard.parallel.groups import Groups
from anyshard.parallel.part import part_of
from anyshard.parallel.stages import Costs, Division, Stages, division_of, plan_stages, stage_problems
from anyshard.parallel.topology import Mesh
from anyshard.parallel.whole import Whole, mark_whole

logger = logging.getLogger(__name__)

Batch = dict[str, torch.Tensor]
Finish = Callable[[Any, Batch, int], torch.Tensor]
"""What the last stage makes of a micro-batch: of the model (as a task calls it), the batch and its number."""


class Same(nn.Module):
    """In the place of a layer, norm or dropout that another stage has."""

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Shape: anything -> the same."""
        return hidden


class Zero(nn.Module):
    """In the place of what the first stage has added to the hidden states."""

    def forward(self, first: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """A zero of no dims, which takes the type of what it is added to."""
        return torch.zeros((), device=first.device)


class Never(nn.Module):
    """In the place of what another stage calls."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Raises AssertionError: the description of this model in stages.yaml is wrong."""
        raise AssertionError("a pipeline stage calls a module that it does not have: correct parallel/stages.yaml")


_STAND_INS: dict[str, type[nn.Module]] = {"same": Same, "zero": Zero, "never": Never}


def divide(
    model: Any, parallel: Parallel, model_name: str, measure: Callable[[Division], Costs | None] = lambda division: None
) -> Stages:
    """The stages of a whole Hugging Face model, on any device.

    Args:
        measure: gives times of the parts, if they are wanted.

    Raises:
        ConfigError: it cannot be divided so.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_input_embeddings"):
        reason = f"{type(model).__name__} is no Hugging Face model."
        raise ConfigError(Problem("parallel.pp", parallel.pp, reason, "Set parallel.pp=1."))
    text = config.get_text_config()
    params = {name: param.numel() for name, param in model.named_parameters()}
    problems = stage_problems(parallel, params, text.num_hidden_layers, model_name, text.model_type)
    if getattr(text, "output_router_logits", False):
        problems.append(balance_problem(parallel.pp))
    if problems:
        raise ConfigError(problems)
    division = division_of(text.model_type)
    assert division is not None
    return plan_stages(division, params, _tied(model), parallel, text.num_hidden_layers, measure(division))


def _tied(model: nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    every = model.named_parameters(remove_duplicate=False)
    return {name: known for name, param in every if (known := first.setdefault(id(param), name)) != name}


def _persistent_buffers(model: nn.Module) -> dict[str, tuple[int, ...]]:
    found = {}
    for prefix, module in model.named_modules():
        for key, buffer in module.named_buffers(recurse=False):
            if key not in module._non_persistent_buffers_set and buffer.numel():
                found[f"{prefix}.{key}" if prefix else key] = tuple(buffer.shape)
    return found


def keep_stage(model: nn.Module, stages: Stages, stage: int) -> Whole:
    """Leave in a whole model what one stage has of it, in place; returns what was there.

    A module of the first stage whose parameter the last one uses as well (the embedding of a tied head) stays there too, so
    that the parameter keeps its name.
    """
    params = {name: tuple(param.shape) for name, param in model.named_parameters()}
    tied, buffers, last = _tied(model), _persistent_buffers(model), stages.num_stages - 1
    division = stages.division
    shared = division.shared(tied)
    copies = {name for name in buffers if "." not in name} if stage else set()  # of the model itself: on every stage
    for path in model.get_submodule(division.layers)._modules.copy():
        if int(path) not in stages.layers(stage):
            _replace(model, f"{division.layers}.{path}", "same")
    for path, stand_in in division.first.items() if stage else ():
        names = {name for name in shared if name.startswith(f"{path}.")}
        if stage == last and names:
            copies |= names
            copies |= {name for name in buffers if name.startswith(f"{path}.")}
        else:
            _replace(model, path, stand_in)
    for path, stand_in in division.last.items() if stage != last else ():
        _replace(model, path, stand_in)
    return Whole(params, buffers, tied, frozenset(copies))


def _replace(model: nn.Module, path: str, stand_in: str) -> None:
    parent, _, attribute = path.rpartition(".")
    owner = model.get_submodule(parent)
    if getattr(owner, attribute, None) is not None:  # some models have no projection or no last norm
        setattr(owner, attribute, _STAND_INS[stand_in]())


def topology_of(mesh: Mesh) -> ProcessTopology:
    """Our mesh as DeepSpeed has it: slowest-varying axis first."""
    names = {"pp": "pipe", "dp": "data", "tp": "model"}
    axes = [axis for axis in reversed(mesh.order) if axis in names]
    return ProcessTopology([names[axis] for axis in axes], [getattr(mesh, axis) for axis in axes])


class Rest:
    """What a task sees of the model on the last stage: called with the batch, it goes on from the hidden states."""

    def __init__(self, model: Any, hidden: torch.Tensor | None) -> None:
        self.module, self._hidden = model, hidden
        self.training: bool = model.training

    def __call__(self, **inputs: Any) -> Any:
        """Run the last stage; returns what the whole model would."""
        if self._hidden is not None:
            del inputs["input_ids"]
            inputs["inputs_embeds"] = self._hidden
        return self.module(**inputs)


class Stage:
    """Runs micro-batches through what `keep_stage` left of a model.

    Args:
        first, last: whether it is the first or the last stage; both, where there is one.
    """

    def __init__(self, model: Any, *, first: bool, last: bool) -> None:
        self.model, self.first, self.last = model, first, last
        self._takes = set(inspect.signature(model.forward).parameters) - {"input_ids", "labels"}

    def run(self, hidden: torch.Tensor, batch: Batch, finish: Callable[[Any, Batch], torch.Tensor]) -> torch.Tensor:
        """One micro-batch.

        Shape: token ids [B, S] on the first stage, hidden states [B, S, H] on others; returns hidden states, or what `finish`
        makes of the model and the batch on the last stage.
        """
        if self.last:
            return finish(Rest(self.model, None if self.first else hidden), batch)
        given = {name: value for name, value in batch.items() if name in self._takes}
        given["input_ids" if self.first else "inputs_embeds"] = hidden
        output: torch.Tensor = self.model.base_model(**given, use_cache=False).last_hidden_state
        return output.contiguous()


def _unused(inputs: Any) -> Any:
    """Stands for the layers that DeepSpeed deals out to stages: `Pipeline.forward` does what they would do."""
    raise AssertionError("Pipeline.forward runs the stage")


class Pipeline(PipelineModule):  # type: ignore[misc]
    """One stage, whose parameters have the names that they have in the whole model.

    DeepSpeed gives it tensors only; the rest of a micro-batch (positions of packed documents, labels) every stage takes from
    its own loader, which gives the same samples to all: `feed` before each call of the engine.

    Args:
        model: what `keep_stage` left, with values.
        whole: what it returned.

    Collective: every rank makes one; it blocks (process groups are made).

    Source: deepspeed 0.19.8 runtime/pipe/module.py:117 (layers that are functions are not registered), pipe/engine.py:281
    (get_tied_weights_and_groups), :760 (without a loss function the output of the last stage is the loss).
    """

    def __init__(self, model: Any, stages: Stages, whole: Whole, groups: Groups) -> None:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            super().__init__(layers=[_unused] * groups.mesh.pp, topology=topology_of(groups.mesh), partition_method="uniform")
        logger.info("%s", printed.getvalue().strip())
        self.stages, self._groups = stages, groups
        self.first, self.last = groups.pp_rank == 0, groups.pp_rank == groups.mesh.pp - 1
        self._stage = Stage(model, first=self.first, last=self.last)
        self.on_forward: Callable[[], None] = _nothing
        # the children, not the model itself: it would put its name before that of every parameter
        for name, child in model.named_children():
            self.add_module(name, child)
        self._buffers.update(model._buffers)
        self._non_persistent_buffers_set |= model._non_persistent_buffers_set
        self._batches: deque[Batch] = deque()
        self._finish: Finish = _no_finish
        self._number = 0
        mark_whole(self, whole)
        self._declare(whole)

    @property
    def hf(self) -> Any:
        """The Hugging Face model, with stand-ins for what other stages have."""
        return self._stage.model

    def get_output_embeddings(self) -> nn.Module:
        """The head, or what stands in its place."""
        head: nn.Module = self.hf.get_output_embeddings()
        return head

    def train(self, mode: bool = True) -> Pipeline:
        """Set the mode of the stage and of the model around it."""
        super().train(mode)
        if hasattr(self, "_stage"):
            self.hf.training = mode
        return self

    def feed(self, batches: Sequence[Batch], finish: Finish) -> None:
        """The micro-batches that the next call of the engine runs, in order, and what the last stage makes of each."""
        self._batches, self._finish, self._number = deque(batches), finish, 0

    def inputs(self, batches: Iterable[Batch]) -> Any:
        """What DeepSpeed reads: token ids for the first stage; the last one needs no labels from it."""
        return iter([(batch["input_ids"], None) for batch in batches])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The next micro-batch through this stage; as `Stage.run`."""
        batch, number = self._batches.popleft(), self._number
        self._number += 1
        self.on_forward()
        return self._stage.run(hidden, batch, lambda model, batch: self._finish(model, batch, number))

    def get_tied_weights_and_groups(self) -> list[tuple[nn.Parameter, Any]]:
        """Weights that the first and the last stage have, whose gradients DeepSpeed sums before it reduces them."""
        if not (self.first or self.last) or self._groups.pp_ends is None:
            return []
        return [(param, self._groups.pp_ends) for param in self._tied_params]

    def _declare(self, whole: Whole) -> None:
        """Tell DeepSpeed's gradient norms what this rank counts: of what several ranks hold the first one's.

        Source: deepspeed 0.19.8 runtime/utils.py:394 (stage 0), runtime/zero/stage_1_and_2.py:1919.
        """
        ends = self.stages.division.shared(whole.tied)
        self._tied_params = []
        for name, param in self.named_parameters():
            part = part_of(param)
            canonical = name if part is None else part.name
            if canonical in ends and (self.first or self.last):
                self._tied_params.append(param)
            copy = canonical in whole.copies
            counted = part.holders[0] == self._groups.tp_rank if part is not None else self._groups.tp_rank == 0
            param.ds_pipe_replicated = copy
            setattr(param, DS_TENSOR_MODEL_PARALLEL, counted and not copy)

    def counted_squares(self) -> torch.Tensor:
        """Sum of squares of all gradients of the whole model, each counted once.

        Collective: the ranks of one pipeline call it, with their tensor-parallel peers; it blocks.
        """
        counted = [param for param in self.parameters() if getattr(param, DS_TENSOR_MODEL_PARALLEL)]
        grads = [param.grad for param in counted if param.grad is not None]
        total = nn.utils.get_total_norm(grads) ** 2
        torch.distributed.all_reduce(total, group=self._grid.get_model_parallel_group())
        return total


def _nothing() -> None:
    """Called before each forward pass where nobody wants to know."""


def _no_finish(model: Any, batch: Batch, number: int) -> torch.Tensor:
    raise AssertionError("feed the stage before the engine runs it")
