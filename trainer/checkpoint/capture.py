"""What a checkpoint holds beside the tensors, and which tensors a rank writes: taken from a live engine between two steps."""

from __future__ import annotations

import datetime
import json
import platform
from dataclasses import dataclass
from typing import Any

import torch

from anyshard.trainer.checkpoint import layout, optimizers
from anyshard.trainer.checkpoint.manifest import Commit, Scalar
from anyshard.trainer.checkpoint.views import Views

SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class Captured:
    """The state of one rank at one step.

    Attributes:
        buffers: copies of what a forward pass may change; on rank 0.
        rank_meta: what the trainer stores for this rank.
        commit: on rank 0, COMMIT without the manifests.
    """

    buffers: list[layout.Fragment]
    scalars: list[Scalar]
    rank_meta: dict[str, Any]
    commit: Commit | None


def capture(
    engine: Any, views: Views, *, step: int, meta: dict[str, Any], rank_meta: dict[str, Any], rank: int, world_size: int
) -> Captured:
    """Take everything that is small at once.

    Args:
        views: of the large rest.

    Raises:
        CheckpointError: a buffer cannot be stored.
        TypeError: `meta` or `rank_meta` is not JSON.
    """
    scalars = optimizers.scalars_of(views.owners, views.optimizer)
    commit = commit_record(engine, step, _frozen(meta), views.tied, world_size) if rank == 0 else None
    return Captured(views.copied_buffers(), scalars, _frozen(rank_meta), commit)


def _frozen(meta: dict[str, Any]) -> dict[str, Any]:
    """A copy that the loop cannot change any more; raises TypeError for what is not JSON."""
    copy: dict[str, Any] = json.loads(json.dumps(meta))
    return copy


def commit_record(engine: Any, step: int, meta: dict[str, Any], tied: dict[str, str], world_size: int) -> Commit:
    """COMMIT of the present state, without the manifests."""
    import deepspeed

    import anyshard

    optimizer = layout.inner_optimizer(engine)
    return Commit(
        step=step,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        layout={**layout.describe(engine), "world_size": world_size},
        versions={
            "anyshard": anyshard.__version__,
            "torch": torch.__version__,
            "deepspeed": deepspeed.__version__,
            "python": platform.python_version(),
        },
        engine={
            "global_steps": engine.global_steps,
            "skipped_steps": engine.skipped_steps,
            "optimizer_steps": engine.global_steps - engine.skipped_steps,
            "loss_scaler": scaler_state(engine),
        },
        optimizer={
            "class": type(optimizer).__name__,
            "kind": optimizers.habits_of(optimizer).kind,
            "groups": optimizers.hyper_parameters(optimizer),
        },
        tied=tied,
        meta=meta,
        manifests=[],
    )


def scaler_state(engine: Any) -> dict[str, float] | None:
    """What fp16's dynamic loss scaling has learnt; None without it."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return {key: getattr(scaler, key) for key in SCALER_FIELDS} if getattr(scaler, "dynamic", False) else None


def restore_scaler(engine: Any, stored: dict[str, float] | None) -> list[str]:
    """Let fp16's loss scaling go on from a checkpoint; returns notes."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    dynamic = getattr(scaler, "dynamic", False)
    if stored and dynamic:
        for key in SCALER_FIELDS:
            setattr(scaler, key, stored[key])
    if stored and not dynamic:
        return [f"the loss scale {stored['cur_scale']:g} of the checkpoint is not used: this run does not scale losses"]
    return ["the checkpoint has no loss scale: it starts from its initial value"] if dynamic and not stored else []
