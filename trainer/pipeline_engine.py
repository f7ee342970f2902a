"""The engine of one pipeline stage: whole batches instead of micro-steps, the rest of the loop unchanged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from anyshard.parallel.groups import Groups
from anyshard.trainer.engine import Engine
from anyshard.trainer.task import Batch


class PipelinedEngine(Engine):
    """A DeepSpeed pipeline engine around a `parallel.pipeline.Pipeline`."""

    def __init__(self, ds: Any, *, stage: int, lr: float, groups: Groups) -> None:
        super().__init__(ds, stage=stage, lr=lr, groups=groups)
        self._stage: Any = ds.module
        self._norm: torch.Tensor | None = None
        self._norm_wanted = False
        if stage == 0:
            self._take_model_step, ds._take_model_step = ds._take_model_step, self._note_norm_and_step

    def _note_norm_and_step(self, lr_kwargs: Any) -> None:
        """DeepSpeed's step at stage 0, with the norm that it computes and drops.

        Source: deepspeed 0.19.8 runtime/pipe/engine.py:1227, `_exec_optimizer_step`; runtime/engine.py:3503.
        """
        if self._norm_wanted:
            self._norm = self._stage.counted_squares().sqrt()
        self._take_model_step(lr_kwargs)

    def train_step(
        self,
        loss_fn: Callable[[nn.Module, Batch], torch.Tensor],
        batches: Sequence[Batch],
        scales: Sequence[Any] | torch.Tensor,
        *,
        logged: bool,
        beat: Callable[[], None],
    ) -> tuple[list[torch.Tensor], torch.Tensor | float | None]:
        """As `Engine.train_step`; the loss that it returns is that of the global batch."""

        def finish(model: Any, batch: Batch, number: int) -> torch.Tensor:
            loss = loss_fn(model, batch)
            return loss if scales[number] is None else loss * scales[number]

        self._norm, self._norm_wanted = None, logged
        self._stage.on_forward = beat
        self._stage.feed(batches, finish)
        loss = self.ds.train_batch(self._stage.inputs(batches))
        beat()
        return [loss.detach()] if logged else [], self._norm

    def measure(
        self, batches: Sequence[Batch], numbers: Callable[[Any, Batch], dict[str, torch.Tensor]], beat: Callable[[], None]
    ) -> list[dict[str, torch.Tensor]]:
        """As `Engine.measure`; only the last stage knows the numbers, the others return an empty list."""
        names: list[str] = []

        def finish(model: Any, batch: Batch, number: int) -> torch.Tensor:
            found = numbers(model, batch)
            names[:] = list(found)
            return torch.stack([value.detach().float() for value in found.values()])

        self._stage.on_forward = beat
        outputs = self._forward_only(batches, finish)
        return [dict(zip(names, output, strict=True)) for output in outputs]

    def _forward_only(self, batches: Sequence[Batch], finish: Callable[[Any, Batch, int], torch.Tensor]) -> list[torch.Tensor]:
        """What the last stage makes of each batch; empty on the others.

        The shapes of training are forgotten before and after: those of `batches` may be others.
        """
        if not batches:
            return []
        self._stage.feed(batches, finish)
        self.ds.reset_activation_shape()
        self.ds.total_loss = None  # that of training, to which eval_batch would add (runtime/pipe/engine.py:781)
        outputs = self.ds.eval_batch(
            self._stage.inputs(batches), reduce_output=None, bcast_loss=False, num_micro_batches=len(batches)
        )
        self.ds.reset_activation_shape()
        self._stage.train()
        return list(outputs) if self._stage.last else []

    def agree(self, numbers: dict[str, float]) -> dict[str, float]:
        """Those of the last stage, on all of its pipeline. Collective."""
        shared = [numbers]
        source = self.groups.mesh.group("pp", self.groups.rank)[-1]
        dist.broadcast_object_list(shared, src=source, group=self.groups.pp, device=self.ds.device)
        return shared[0]

    def next_logits(self, ids_S: torch.Tensor) -> torch.Tensor:
        """As `Engine.next_logits`."""

        def finish(model: Any, batch: Batch, number: int) -> torch.Tensor:
            logits_V: torch.Tensor = model(**batch, use_cache=False).logits[0, -1].float()
            return logits_V

        outputs = self._forward_only([{"input_ids": ids_S[None]}], finish)
        size = torch.tensor([outputs[0].numel() if outputs else 0], device=ids_S.device)
        source = self.groups.mesh.group("pp", self.groups.rank)[-1]
        dist.broadcast(size, src=source, group=self.groups.pp)
        logits_V = outputs[0].contiguous() if outputs else torch.empty(int(size), device=ids_S.device)
        dist.broadcast(logits_V, src=source, group=self.groups.pp)
        return logits_V.cpu()
