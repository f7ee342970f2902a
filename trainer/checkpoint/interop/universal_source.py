"""DeepSpeed's universal folder, as `ds_to_universal` makes it: one file for each state of each parameter.

Source: deepspeed 0.19.8 checkpoint/ds_to_universal.py:305 (`merge_tp_slices`), :543 (`merge_zero3_slices`: a flat tensor).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from anyshard.configs.errors import CheckpointError
from anyshard.trainer.checkpoint.interop.foreign import (
    frozen_parameter,
    load,
    load_mapping,
    natural,
    need,
    optimizer_kind,
    record_of,
    step_scalars,
)
from anyshard.trainer.checkpoint.interop.source import Key
from anyshard.trainer.checkpoint.layout import dtype_name
from anyshard.trainer.checkpoint.manifest import BUFFER, PARAM, Tensor

FP32, STEP = "fp32", "step"


class UniversalSource:
    """Every tensor is a file of its own; it is opened when it is read."""

    format = "universal"

    def __init__(self, path: Path, *, weights_only: bool = False) -> None:
        """Read the records of the folder that holds `zero/`.

        Raises:
            CheckpointError: a file is refused, missing or damaged.
        """
        self.path = path
        model_files = sorted(path.glob("*mp_rank_*_model_states.pt"), key=natural)
        if not model_files:
            raise CheckpointError(f"{path}: there is no *model_states.pt beside zero/.")
        states = load_mapping(model_files[0])
        shapes = need(states, "param_shapes", model_files[0])
        shapes = [shapes] if isinstance(shapes, dict) else shapes
        self._shapes = {name: tuple(shape) for group in shapes for name, shape in group.items()}
        self._module = states.get("module") or {}
        optim = load_mapping(path / "zero" / "optimizer_state.pt")
        groups = need(optim, "param_groups", path / "zero" / "optimizer_state.pt")
        inner = optim.get("optimizer_state_dict")
        self._common_step = inner["state"][0].get(STEP) if isinstance(inner, dict) and inner.get("state") else None
        tied, buffers = states.get("shared_params") or {}, states.get("buffer_names") or []
        folders = {each.name: each for each in sorted((path / "zero").iterdir()) if each.is_dir()}
        missing = [name for name in self._shapes if name not in folders and name not in tied and math.prod(self._shapes[name])]
        if missing:
            raise CheckpointError(f"{path}: zero/ lacks {missing[0]}: the conversion was not finished.")
        order = [*(name for name in self._shapes if name in folders), *(name for name in folders if name not in self._shapes)]
        names = [name for name in order if name not in tied and name not in buffers]
        keys = {file.stem for name in names for file in folders[name].glob("*.pt")} - {FP32, STEP}
        if weights_only:
            keys = set()
        optimizer, used = optimizer_kind(keys, groups[0] if groups else {}, path)
        self._paths: dict[Key, Path] = {}
        self.tensors: dict[Key, Tensor] = {}
        steps: dict[str, Any] = {}
        for name in names:
            for state in (FP32, *sorted(used)):
                file = folders[name] / f"{state}.pt"
                if state == FP32 or file.is_file():
                    self._add((name, PARAM if state == FP32 else state), file)
            if any((name, state) in self.tensors for state in used):
                step = folders[name] / f"{STEP}.pt"
                steps[name] = load(step) if step.is_file() else self._common_step
        self._frozen = self._frozen_of_stage_3(states, folders, model_files)
        for (name, key), whole in self._frozen.items():
            self.tensors[name, key] = Tensor(name, key, dtype_name(whole.dtype), tuple(whole.shape))
        for name in buffers:
            if name in self._module and self._module[name].numel():
                buffer = self._module[name]
                self.tensors[name, BUFFER] = Tensor(name, BUFFER, dtype_name(buffer.dtype), tuple(buffer.shape))
        self.record = record_of(
            states,
            path,
            format=self.format,
            optimizer=optimizer,
            scalars=step_scalars(steps),
            param_groups=groups,
            scaler=optim.get("loss_scaler"),
            zero=int(optim.get("zero_stage", 1)),
        )

    def _frozen_of_stage_3(
        self, states: dict[str, Any], folders: Mapping[str, Path], files: list[Path]
    ) -> dict[Key, torch.Tensor]:
        """Frozen parameters, which the converter leaves in the model states of the ranks."""
        shapes = {name: tuple(shape) for name, shape in (states.get("frozen_param_shapes") or {}).items()}
        models = [states, *(load_mapping(file) for file in files[1:])] if shapes else []
        left = {name: shape for name, shape in shapes.items() if name not in folders and math.prod(shape)}
        return {(name, PARAM): frozen_parameter(models, name, shape, self.path) for name, shape in left.items()}

    def _add(self, key: Key, file: Path) -> None:
        tensor = self._open(file)
        shape = self._shapes.get(key[0], tuple(tensor.shape))
        if math.prod(shape) != tensor.numel():
            raise CheckpointError(f"{file}: it has {tensor.numel()} elements, {key[0]} has shape {shape}.")
        self._paths[key] = file
        self.tensors[key] = Tensor(*key, dtype_name(tensor.dtype), shape)

    @staticmethod
    def _open(file: Path) -> torch.Tensor:
        content = load(file)
        tensor = content.get("param") if isinstance(content, dict) else content
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{file}: it holds no tensor.")
        return tensor

    def read(self, key: Key) -> torch.Tensor:
        """One whole tensor."""
        if key in self._frozen:
            return self._frozen[key]
        if key[1] == BUFFER:
            buffer: torch.Tensor = self._module[key[0]].clone()
            return buffer
        return self._open(self._paths[key]).view(self.tensors[key].shape).clone()
