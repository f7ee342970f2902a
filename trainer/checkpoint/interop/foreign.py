"""Pickles of DeepSpeed, opened without running anything that is in them, and what is common to its formats.

`torch.load(weights_only=True)` makes tensors, numbers, strings and containers. What else DeepSpeed stores is named here, and
becomes an empty shell with the stored attributes; a file that names anything more is refused.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from anyshard.configs.errors import CheckpointError
from anyshard.trainer.checkpoint.interop.output import reading
from anyshard.trainer.checkpoint.interop.source import Record
from anyshard.trainer.checkpoint.manifest import Scalar


class Shell:
    """Takes the place of a class of DeepSpeed: it has the attributes that were stored, and no code."""


class Fragment(Shell):
    """`fragment_address`: a part of a flat tensor."""

    numel: int
    start: int


class Scaler(Shell):
    """A loss scaler."""


_STAGES = {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3, "max_stage": 3}


class ZeroStage(int):
    """`ZeroStageEnum`. Its members are pickled by value, or by name where a library changed how enumerations are pickled."""


def _member(owner: object, name: object) -> int:
    """Takes the place of `getattr`, and looks up nothing but the stages of ZeRO by their names.

    Raises:
        UnpicklingError: anything else was asked for.
    """
    if owner is not ZeroStage or name not in _STAGES:
        raise pickle.UnpicklingError("GLOBAL getattr")
    return _STAGES[str(name)]


_SHELLS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (Scaler, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (Scaler, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (Fragment, "deepspeed.utils.tensor_fragment.fragment_address"),
    (ZeroStage, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_member, "builtins.getattr"),
    (_member, "__builtin__.getattr"),
]
SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
NUMBERS = re.compile(r"(\d+)")


def load(path: Path) -> Any:
    """What a pickle of DeepSpeed holds; tensors stay in the file until they are used.

    Raises:
        CheckpointError: it names code, which could do anything, or it is damaged.
    """
    with reading(path), torch.serialization.safe_globals(list(_SHELLS)):
        try:
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            named = re.search(r"GLOBAL ([\w.]+)|`?([\w.]+)`? was not an allowed global", str(error))
            what = f"it names {named[1] or named[2]}" if named else " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"{path}: refused: {what}, and only tensors, numbers, texts and DeepSpeed's own records are read, "
                "since a pickle can run any code. Save it again without that object (client_state is one such place)."
            ) from error
        except (RuntimeError, ValueError, EOFError, KeyError) as error:
            raise CheckpointError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]}).") from error


def load_mapping(path: Path) -> dict[str, Any]:
    """The same of a file that holds a dictionary.

    Raises:
        CheckpointError: it holds something else.
    """
    content = load(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: it holds a {type(content).__name__}, not a dictionary: DeepSpeed did not write it.")
    return content


def natural(path: Path) -> list[int]:
    """Sorts names by the numbers in them."""
    return [int(number) for number in NUMBERS.findall(path.name)]


def need(content: Mapping[str, Any], key: str, where: Path) -> Any:
    """A value that must be there.

    Raises:
        CheckpointError: it is not.
    """
    if key not in content:
        raise CheckpointError(f"{where}: it has no {key}: this version of DeepSpeed's checkpoints is not known here.")
    return content[key]


def frozen_parameter(models: Iterable[Mapping[str, Any]], name: str, shape: tuple[int, ...], where: Path) -> torch.Tensor:
    """A parameter that no optimizer steps, from the parts in the model states of all ranks of ZeRO 3.

    Raises:
        CheckpointError: they are not all there.
    """
    parts = [need(model.get("frozen_param_fragments") or {}, name, where).reshape(-1) for model in models]
    whole, numel = torch.cat(parts), math.prod(shape)
    if whole.numel() < numel:
        raise CheckpointError(f"{where}: {whole.numel()} of {numel} elements of {name} are in its model states.")
    return whole[:numel].view(shape).clone()


def refuse_other_layouts(folder: Path) -> None:
    """Refuse what was cut in other ways than by data parallelism.

    Raises:
        CheckpointError: says how.
    """
    names = [path.name for path in folder.iterdir()]
    reasons = {
        "tensor or pipeline parallelism": any(re.search(r"mp_rank_(?!00_model|00_optim)\d", name) for name in names)
        or any(re.match(r"layer_\d+-model", name) for name in names),
        "experts in files of their own": any("expert_" in name or name.startswith("expp_rank") for name in names),
        "optimizer states on NVMe, which DeepSpeed copies without saying what they are": "offloaded_tensors" in names,
    }
    for reason, found in reasons.items():
        if found:
            fix = "Save it once from a run with data parallelism only, or convert it with deepspeed.checkpoint.ds_to_universal"
            raise CheckpointError(f"{folder}: it was saved with {reason}; that cannot be imported. {fix}.")


def optimizer_kind(keys: Iterable[str], group: Mapping[str, Any], where: Path) -> tuple[dict[str, Any], frozenset[str]]:
    """Which optimizer these states are of, since DeepSpeed does not say; and which of them mean something.

    Raises:
        CheckpointError: it is none that is known.
    """
    found = frozenset(keys)
    if not found:
        return {"class": "none", "kind": "none", "groups": {}}, found
    if found == {"exp_avg", "exp_avg_sq"}:
        if "eps" in group:
            return {"class": "Adam", "kind": "adam", "groups": {}}, found
        found = frozenset({"exp_avg"})  # DeepSpeedCPULion allocates the second and never reads it
    if found == {"exp_avg"}:
        return {"class": "Lion", "kind": "lion", "groups": {}}, found
    if found == {"momentum_buffer"}:
        return {"class": "SGD", "kind": "sgd", "groups": {}}, found
    if found == {"sum"}:
        return {"class": "Adagrad", "kind": "adagrad", "groups": {}}, found
    raise CheckpointError(
        f"{where}: the optimizer states {', '.join(sorted(found))} are of no optimizer that is known here. "
        "Import the weights alone, with --weights."
    )


def step_scalars(steps: Mapping[str, Any]) -> list[Scalar]:
    """Parameter name -> its optimizer's step, as scalars."""
    names: dict[float, list[str]] = {}
    for name, step in steps.items():
        if step is not None:
            names.setdefault(float(step), []).append(name)
    return [Scalar("step", "float32", value, tuple(members)) for value, members in names.items()]


def record_of(
    states: Mapping[str, Any],
    where: Path,
    *,
    format: str,
    optimizer: dict[str, Any],
    scalars: list[Scalar],
    param_groups: Iterable[Mapping[str, Any]],
    scaler: Any,
    zero: int,
) -> Record:
    """The record of a DeepSpeed checkpoint, from its model states; `meta` is as `fit` writes it."""
    global_steps, skipped = int(need(states, "global_steps", where)), int(states.get("skipped_steps", 0))
    dp = int(states.get("dp_world_size", 1))
    layout = {"dp": dp, "tp": 1, "pp": 1, "sp": 1, "zero": zero, "offload_optimizer": "none", "offload_param": "none"}
    scale = {key: getattr(scaler, key, None) for key in SCALER_FIELDS} if isinstance(scaler, Scaler) else {}
    known = bool(scale) and all(isinstance(value, int | float) for value in scale.values())
    groups = [{key: value for key, value in group.items() if _is_plain(value)} for group in param_groups]
    config = states.get("ds_config")
    meta = {
        "step": global_steps,
        "samples": int(states.get("global_samples", 0)),
        "tokens": 0,
        "layout": layout,
        "data_fingerprint": None,
        "global_batch_size": config.get("train_batch_size") if isinstance(config, dict) else None,
        "optimizer": {},
        "callbacks": {},
        "imported": {"format": format, "from": str(where), "param_groups": groups},
    }
    engine = {
        "global_steps": global_steps,
        "skipped_steps": skipped,
        "optimizer_steps": global_steps - skipped,
        "loss_scaler": scale if known else None,
    }
    tied = {str(other): str(name) for other, name in (states.get("shared_params") or {}).items()}
    notes = ["hyper-parameters, schedule and data are those of the run that resumes; random number generators start anew"]
    return Record(global_steps, optimizer, engine, layout, tied, meta, scalars, notes)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(isinstance(item, int | float | str) for item in value) and len(value) < 9
    return value is None or isinstance(value, bool | int | float | str)
