"""Where a run goes on: from which checkpoint, and what is said and done where that has another layout or other options."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from anyshard.configs import schema
from anyshard.configs.errors import CheckpointError
from anyshard.parallel.topology import AXES
from anyshard.trainer.callbacks.base import Callbacks
from anyshard.trainer.checkpoint import ram
from anyshard.trainer.checkpoint.manager import CheckpointManager
from anyshard.trainer.engine import Engine
from anyshard.trainer.metrics import Reporter
from anyshard.trainer.state import Progress, load_rng_state, seed_everything


def is_in_memory(path: Path, memory: CheckpointManager | None) -> bool:
    """Whether a checkpoint is in shared memory, which is not durable."""
    return memory is not None and path.parent == memory.directory


def _find(config: schema.Config, manager: CheckpointManager, memory: CheckpointManager | None) -> Path | None:
    """The checkpoint to continue from: the newest, wherever it is. Collective."""
    if memory is not None and config.resume not in ("auto", "must"):
        memory.discard()
        ram.make(memory.directory)
    elif memory is not None:
        kept = None
        with contextlib.suppress(CheckpointError):  # all are damaged, which is logged: the disk has another
            kept = memory.find("auto")
        if kept is not None and int(kept.name.removeprefix("step-")) >= manager.newest_step():
            return kept
    return manager.find(config.resume)


def restore(
    config: schema.Config,
    manager: CheckpointManager,
    memory: CheckpointManager | None,
    engine: Engine,
    progress: Progress,
    callbacks: Callbacks,
    *,
    world_size: int,
    reporter: Reporter,
    data_fingerprint: str | None,
) -> Path | None:
    """Continue from the checkpoint that `resume` names, if any; returns it.

    Collective: every rank calls it; it blocks.

    Args:
        memory: of the checkpoints in shared memory; None for none.
        progress: set to where the run goes on.

    Raises:
        CheckpointError: there is none that can be restored, where one must be.
    """
    path = _find(config, manager, memory)
    if path is None:
        if config.resume == "never":
            _leave_branch(manager, -1, reporter)
        return None
    restored = manager.restore(engine.ds, path)
    meta = restored.meta
    progress.step, progress.samples, progress.tokens = meta["step"], meta["samples"], meta["tokens"]
    progress.evaluation = dict(meta.get("evaluation") or {})
    notes = list(restored.notes)
    here = layout_of(config, world_size)
    if restored.rank_meta and meta["layout"] == here:
        load_rng_state(restored.rank_meta["rng"])
    else:
        seed_everything(config.seed, "train", *engine.groups.stream, progress.step)
        notes.append("random number generators of the ranks are seeded anew from the seed and the step (another layout)")
    if data_fingerprint != meta["data_fingerprint"]:
        notes.append("the data is not the data that the checkpoint was trained on")
    notes += _apply_changed_options(engine, config.optimizer, meta["optimizer"])
    notes += [f"no callback takes the state of {name!r}" for name in callbacks.load_state_dict(meta["callbacks"])]
    reporter.event("restore", step=progress.step, path=str(path), layout=here, saved_layout=meta["layout"], notes=notes)
    saved = (
        "the same layout"
        if meta["layout"] == here
        else f"saved under {describe_layout(meta['layout'])}, now {describe_layout(here)}"
    )
    reporter.say(f"resumed from {path} at step {progress.step} ({saved})")
    for note in notes:
        reporter.say(f"  note: {note}")
    if config.resume not in ("auto", "must"):
        _leave_branch(manager, progress.step, reporter)
    return path


def _leave_branch(manager: CheckpointManager, step: int, reporter: Reporter) -> None:
    """A run that was told to go back, or to start anew, must not find its own later checkpoints again. Collective."""
    aside = manager.set_aside(step)
    if aside:
        reporter.event("set_aside", names=aside, folder=str(manager.directory))
        reporter.say(
            f"  note: {len(aside)} checkpoints of later steps are set aside as {manager.directory}/step-*.abandoned-*; "
            "delete them when they are not needed any more"
        )


def _apply_changed_options(engine: Engine, optimizer: schema.Optimizer, saved: dict[str, Any]) -> list[str]:
    """Let the configuration win where it was changed by force; param groups otherwise keep what the checkpoint had."""
    changed = [
        name
        for name in ("weight_decay", "betas", "eps", "momentum")
        if getattr(optimizer, name) != saved.get(name, getattr(optimizer, name))
    ]
    for group in engine.ds.optimizer.param_groups:
        for name in changed:
            if name in group and not (name == "weight_decay" and group[name] == 0):  # the no-decay group stays one
                value = getattr(optimizer, name)
                group[name] = tuple(value) if name == "betas" else value
    return [f"optimizer.{name} is now {getattr(optimizer, name)}, was {saved[name]}" for name in changed]


def layout_of(config: schema.Config, world_size: int) -> dict[str, Any]:
    """The layout as stored in a checkpoint."""
    parallel = config.parallel
    degrees = {"tp": parallel.tp, "pp": parallel.pp, "sp": parallel.sp}
    dp = world_size // (parallel.tp * parallel.pp * parallel.sp)
    own_order = {} if list(parallel.order) == list(AXES) else {"order": list(parallel.order)}
    return {
        "dp": dp,
        **degrees,
        **own_order,
        "zero": config.zero.stage,
        "offload_optimizer": config.offload.optimizer.value,
        "offload_param": config.offload.param.value,
    }


def describe_layout(layout: dict[str, Any]) -> str:
    """A layout in a few words: "dp 2, ZeRO 1, optimizer on cpu"."""
    axes = [f"{axis} {layout[axis]}" for axis in ("dp", "tp", "pp", "sp") if axis == "dp" or layout[axis] > 1]
    tiers = [f"{kind} on {layout[f'offload_{kind}']}" for kind in ("optimizer", "param") if layout[f"offload_{kind}"] != "none"]
    return ", ".join([*axes, f"ZeRO {layout['zero']}", *tiers])
