"""The DeepSpeed engine of one rank: built here and nowhere else, and stepped through a small class of ours.

`Engine` hides what differs between ZeRO stages (where the gradient norm is, who clips, how gradients are scaled), so that
the loop in `trainer.py` reads the same under all of them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from anyshard.configs import schema
from anyshard.configs.errors import EnvError
from anyshard.parallel.groups import Groups
from anyshard.trainer.swapping import Swapping
from anyshard.trainer.task import Batch

logger = logging.getLogger(__name__)


class Engine:
    """A DeepSpeed engine and what the loop needs of it.

    Attributes:
        ds: the `deepspeed.DeepSpeedEngine`; call it to run the model.
        groups: where this rank stands.
    """

    def __init__(self, ds: Any, *, stage: int, lr: float, groups: Groups, swapping: Swapping | None = None) -> None:
        self.ds = ds
        self._swapping = swapping
        self.groups = groups
        self.stage = stage
        self._lr = lr

    def set_lr(self, factor: float) -> float:
        """Set the learning rate of every group to `factor` of its peak; returns that of a group without `lr_scale`."""
        lr = self._lr * factor
        for group in self.ds.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        return lr

    def train_micro_step(
        self, loss_fn: Callable[[nn.Module, Batch], torch.Tensor], batch: Batch, scale: torch.Tensor | None
    ) -> torch.Tensor:
        """Forward and backward of one micro-batch; returns its mean loss, detached.

        Args:
            scale: factor on the gradient where micro-batches have unequal numbers of targets.

        Collective: every rank of the data-parallel group calls it (ZeRO gathers and reduces inside).
        """
        with self._explained():
            loss = loss_fn(self.ds, batch)
            self.ds.backward(loss if scale is None else loss * scale)
        return loss.detach()

    def train_step(
        self,
        loss_fn: Callable[[nn.Module, Batch], torch.Tensor],
        batches: Sequence[Batch],
        scales: Sequence[Any] | torch.Tensor,
        *,
        logged: bool,
        beat: Callable[[], None],
    ) -> tuple[list[torch.Tensor], torch.Tensor | float | None]:
        """One optimizer step over the micro-batches of this rank.

        Args:
            scales: a factor on the gradient of each, or None.
            logged: whether losses and norm are wanted.
            beat: called when a micro-step has ended.

        Returns:
            Losses whose mean over them and over all ranks is the loss of the step, and the gradient norm before clipping
            where only the engine's gradients tell it. Both are empty where not logged.

        Collective: every rank calls it with equally many micro-batches; it blocks.
        """
        losses: list[torch.Tensor] = []
        norm: torch.Tensor | float | None = None
        for number, batch in enumerate(batches):
            loss = self.train_micro_step(loss_fn, batch, scales[number])
            if logged:
                losses.append(loss if scales[number] is None else loss * scales[number])
            if logged and number == len(batches) - 1:
                norm = self.local_grad_norm()
            self.finish_micro_step()
            beat()
        return losses, norm

    def measure(
        self, batches: Sequence[Batch], numbers: Callable[[Any, Batch], dict[str, torch.Tensor]], beat: Callable[[], None]
    ) -> list[dict[str, torch.Tensor]]:
        """What `numbers(model, batch)` gives for each batch, without gradients.

        Collective: every rank calls it with equally many batches, all of one shape; it blocks.
        """
        found = []
        self.ds.eval()
        with torch.no_grad():
            for batch in batches:
                found.append(numbers(self.ds, batch))
                beat()
        self.ds.train()
        return found

    def agree(self, numbers: dict[str, float]) -> dict[str, float]:
        """Numbers that some ranks have, on all ranks. Collective."""
        return numbers

    def next_logits(self, ids_S: torch.Tensor) -> torch.Tensor:
        """Logits of the token after a sequence, in float32 on the CPU.

        Shape: [S] -> [V]. Collective: every rank calls it; it blocks.
        """
        self.ds.eval()
        with torch.no_grad():
            logits_V: torch.Tensor = self.ds(input_ids=ids_S[None], use_cache=False).logits[0, -1].float().cpu()
        self.ds.train()
        return logits_V

    def finish_micro_step(self) -> None:
        """Let DeepSpeed count the micro-step; at the last one of a global batch it clips and steps the optimizer."""
        with self._explained():
            self.ds.step()

    def _explained(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._swapping is None else self._swapping.explained()

    def local_grad_norm(self) -> torch.Tensor | None:
        """Global gradient norm before clipping at stage 0, where DeepSpeed does not keep it; None at other stages.

        Call it between the last backward of a step and `finish_micro_step`. Collective under tensor parallelism.
        Source: deepspeed 0.19.8 runtime/engine.py:3510, `clip_fp32_gradients` drops the norm that it computes.
        """
        if self.stage != 0:
            return None
        if self.groups.tp is not None:
            from anyshard.parallel.tensor import counted_squares  # imports DeepSpeed

            return counted_squares(self.ds.module.parameters(), self.groups).sqrt()
        return nn.utils.get_total_norm([p.grad for p in self.ds.module.parameters() if p.grad is not None])

    def grad_norm(self) -> float | None:
        """Global gradient norm of the last step before clipping, at stages 1 to 3."""
        norm = self.ds.get_global_grad_norm()
        return None if norm is None else float(norm)

    @property
    def skipped_steps(self) -> int:
        """Steps that were dropped because their gradients were not finite: by loss scaling, and by ZeRO in any precision."""
        return int(self.ds.skipped_steps)

    @property
    def loss_scale(self) -> float | None:
        """Present loss scale under fp16, None otherwise."""
        return float(self.ds.optimizer.cur_scale) if self.ds.fp16_enabled() else None

    def close(self) -> None:
        """Release DeepSpeed's hooks and buffers. Collective at ZeRO-3."""
        self.ds.destroy()


def build_engine(
    config: schema.Config,
    ds_config: dict[str, Any],
    build_model: Callable[[], nn.Module],
    *,
    device: torch.device,
    groups: Groups,
    swapping: Swapping | None = None,
) -> Engine:
    """Build the model, its optimizer and the DeepSpeed engine around both.

    Args:
        swapping: of a run with state on NVMe.

    Collective: every rank calls it; it blocks until all have.
    """
    import deepspeed

    from anyshard.configs.registry import lookup
    from anyshard.parallel.tensor import is_embedding
    from anyshard.trainer.optim.groups import param_groups

    _quieten(logging.getLogger("DeepSpeed"))
    model = build_model()
    embeddings = {f"{name}.weight" for name, module in model.named_modules() if is_embedding(module)}
    optimized = param_groups(model.named_parameters(), config.optimizer, embeddings)
    build_optimizer = lookup("optimizer", config.optimizer.name, key="optimizer.name")
    if swapping is not None:
        swapping.reserve(model, [group["params"] for group in optimized])
    offloaded = config.offload.optimizer is not schema.Device.none
    optimizer = build_optimizer(optimized, config.optimizer, offloaded=offloaded, device=device)
    _import_muon_as_written()
    ds_engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=ds_config, dist_init_required=False, mpu=groups.mpu()
    )
    ds_engine.anyshard_mesh = groups.mesh  # for the record in checkpoints
    if groups.pp is not None:
        from anyshard.trainer.pipeline_engine import PipelinedEngine

        return PipelinedEngine(ds_engine, stage=config.zero.stage, lr=config.optimizer.lr, groups=groups)
    if swapping is not None:
        swapping.mend(ds_engine)
    return Engine(ds_engine, stage=config.zero.stage, lr=config.optimizer.lr, groups=groups, swapping=swapping)


def require_dtype(dtype: schema.Dtype) -> None:
    """Refuse a type that this device does not compute in.

    Raises:
        EnvError: it does not.
    """
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    missing = {
        schema.Dtype.fp16: not accelerator.is_fp16_supported(),
        schema.Dtype.bf16: not accelerator.is_bf16_supported(),
    }
    if missing.get(dtype):
        lacks = " (it lacks avx512_fp16)" if accelerator.device_name() == "cpu" else ""
        other = "bf16 or fp32" if dtype is schema.Dtype.fp16 else "fp16 or fp32"
        raise EnvError(f"precision.dtype={dtype.value}: this device does not compute in it{lacks}. Use precision={other}.")


def _quieten(upstream: logging.Logger) -> None:
    """Warnings only, on standard error: standard output is for people, and DeepSpeed has a line for every dropped step."""
    upstream.setLevel(logging.WARNING)
    for handler in upstream.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)


def _import_muon_as_written() -> None:
    """Import DeepSpeed's Muon without torch.compile, which takes most of a second to load.

    `initialize` imports it to look whether the optimizer is Muon, whatever it is. An optimizer that uses it was built
    before, has imported it by then, and keeps its compiled kernels.

    Source: deepspeed 0.19.8 runtime/zero/utils.py:72; torch 2.13.0 _dynamo/eval_frame.py:1752 reads the variable when a
    function is decorated.
    """
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        del os.environ["TORCHDYNAMO_DISABLE"]
        if before is not None:
            os.environ["TORCHDYNAMO_DISABLE"] = before


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Mean of a small tensor over all ranks, in place; those that share their data have the same. Collective; it blocks."""
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def sum_over_data(values: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Sum of a small tensor over the ranks with tokens of their own, in place. Collective: every rank calls it; it blocks."""
    if groups.num_shards > 1:
        dist.all_reduce(values, group=groups.dp)
    return values
