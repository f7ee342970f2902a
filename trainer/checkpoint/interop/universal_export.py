"""A checkpoint as DeepSpeed's universal folder, in the form that its loaders of every ZeRO stage accept.

`ds_to_universal` writes another form for ZeRO 3 than for 1 and 2, and each loader refuses the other's. What both read:
tensors in their full shape, the step beside each parameter and in `optimizer_state.pt`, and the records of the model under
both file names.

Source: deepspeed 0.19.8 runtime/base_optimizer.py:332, runtime/zero/stage3.py:3659, runtime/engine.py:4574.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from anyshard.configs.errors import CheckpointError
from anyshard.trainer.checkpoint.interop.output import new_folder
from anyshard.trainer.checkpoint.interop.source import Stored, num_bytes
from anyshard.trainer.checkpoint.manifest import BUFFER, PARAM

STATES = ("exp_avg", "exp_avg_sq")
RECORDS = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")


def export_universal(source: Stored, out: Path, *, report: Callable[[int, int], None]) -> dict[str, Any]:
    """Write the folder, and `latest_universal` that names it, so that `engine.load_checkpoint(out)` finds it.

    Memory: one tensor, and the buffers and frozen parameters.

    Raises:
        CheckpointError: the optimizer is not Adam or AdamW, whose states alone DeepSpeed's loader takes; or it is damaged.
        ConfigError: `out` is occupied.
    """
    record = source.record
    if record.optimizer.get("kind") != "adam":
        raise CheckpointError(
            f"{source.path} holds the state of {record.optimizer.get('class')}, and DeepSpeed's universal format takes that of "
            "Adam and AdamW alone. Export the weights with --to hf, or everything with --to dcp."
        )
    outside = [name for name, _ in source.tensors if Path(name).name != name]
    if outside:
        raise CheckpointError(f"{source.path}: {outside[0]!r} cannot be the name of a folder, which the format wants it to be.")
    stepped = [name for name, key in source.tensors if key == STATES[0]]
    steps = {name: float(scalar.value) for scalar in record.scalars if scalar.key == "step" for name in scalar.names}
    step = max(steps.values(), default=float(record.engine["optimizer_steps"]))
    tag = f"global_step{record.step}_universal"
    total, done = num_bytes(source.tensors), 0
    kept: dict[str, torch.Tensor] = {}
    with new_folder(out) as folder:
        for (name, key), tensor in source.tensors.items():
            whole = source.read((name, key))
            if key == BUFFER or name not in stepped:
                kept[name] = whole
            if key != BUFFER:
                state = "fp32" if key == PARAM else key
                content = {"param": whole.float() if name in stepped else whole, "cat_dim": 0}
                _save(content, folder / tag / "zero" / name / f"{state}.pt")
            done += num_bytes({(name, key): tensor})
            report(done, total)
            del whole
        for name in stepped:
            _save(torch.tensor(steps.get(name, step)), folder / tag / "zero" / name / "step.pt")
        groups = [{"params": [number], "name": name, **each} for number, (name, each) in enumerate(_groups(source).items())]
        optimizer = {
            "ds_version": version("deepspeed"),
            "param_groups": groups,
            "optimizer_state_dict": {"state": {0: {"step": torch.tensor(step)}}, "param_groups": groups},
        }
        _save(optimizer, folder / tag / "zero" / "optimizer_state.pt")
        for file in RECORDS:
            _save(_records(source, stepped, kept), folder / tag / file)
        (folder / "latest_universal").write_text(tag)
    notes = []
    if kept:
        notes.append(
            f"DeepSpeed's loader does not restore buffers and frozen parameters: {len(kept)} are in 'module' of {RECORDS[0]}"
        )
    if len(groups) > 1:
        notes.append(
            "DeepSpeed's ZeRO-3 loader gives every param group the hyper-parameters and the step tensor of the first: "
            "set and clone them again (docs/interop.md)"
        )
    return {"out": str(out), "step": record.step, "tag": tag, "tensors": len(source.tensors), "notes": notes}


def _groups(source: Stored) -> dict[str, dict[str, Any]]:
    """Hyper-parameters by group, with pairs as torch has them."""
    return {
        name: {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
        for name, settings in source.record.optimizer["groups"].items()
    }


def _records(source: Stored, stepped: list[str], kept: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What `engine.load_checkpoint` wants beside the tensors."""
    engine, tensors = source.record.engine, source.tensors
    batch = source.record.meta.get("global_batch_size")
    samples = {"global_samples": engine["global_steps"] * batch} if isinstance(batch, int) else {}
    return {
        "module": kept,
        "buffer_names": [name for name, key in tensors if key == BUFFER],
        "param_shapes": [OrderedDict((name, torch.Size(tensors[name, PARAM].shape)) for name in stepped)],
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "shared_params": source.record.tied,
        "optimizer": None,
        "lr_scheduler": None,
        "data_sampler": None,
        "random_ltd": None,
        "sparse_tensor_module_names": set(),
        "global_steps": engine["global_steps"],
        "skipped_steps": engine["skipped_steps"],
        **samples,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_config": {},
        "ds_version": version("deepspeed"),
    }


def _save(content: Any, path: Path) -> None:
    """Write a file of torch's format, synced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
