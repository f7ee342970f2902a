"""A checkpoint as `engine.save_checkpoint` of DeepSpeed writes it, at ZeRO 1, 2 or 3.

Source: deepspeed 0.19.8 checkpoint/ds_to_universal.py:119 (`extract_zero_shards`), :157 (`extract_zero_shards_stage3`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from anyshard.configs.errors import CheckpointError
from anyshard.trainer.checkpoint.interop.foreign import (
    Fragment,
    frozen_parameter,
    load_mapping,
    natural,
    need,
    optimizer_kind,
    record_of,
    refuse_other_layouts,
    step_scalars,
)
from anyshard.trainer.checkpoint.interop.source import Key
from anyshard.trainer.checkpoint.layout import dtype_name
from anyshard.trainer.checkpoint.manifest import BUFFER, PARAM, Tensor

Part = tuple[int, int, int, int]
"""Rank, number of the flat tensor, first element there, number of elements."""


class DeepSpeedSource:
    """Every tensor is put together from the parts that the ranks wrote; what is not read stays in the files."""

    format = "deepspeed"

    def __init__(self, path: Path, *, weights_only: bool = False) -> None:
        """Read the records of all ranks in the folder of a tag.

        Raises:
            CheckpointError: it cannot be imported, or a file is refused, missing or damaged.
        """
        self.path = path
        refuse_other_layouts(path)
        model_files = sorted(path.glob("*mp_rank_00_model_states.pt"), key=natural)
        optim_files = sorted(path.glob("*zero_pp_rank_*_mp_rank_00_optim_states.pt"), key=natural)
        if not model_files or not optim_files:
            what = "model_states" if not model_files else "zero_pp_rank_*_optim_states"
            raise CheckpointError(f"{path}: there are no *{what}.pt: only checkpoints of ZeRO 1, 2 and 3 can be imported.")
        self._ranks = [need(load_mapping(file), "optimizer_state_dict", file) for file in optim_files]
        self._files = optim_files
        self._stage = int(self._ranks[0].get("zero_stage", 1))
        partitions = self._ranks[0].get("partition_count", len(optim_files))
        partitions = max(partitions) if isinstance(partitions, list) else partitions
        if partitions != len(optim_files):
            raise CheckpointError(f"{path}: {partitions} ranks wrote it, the files of {len(optim_files)} are here.")
        self._models = [load_mapping(file) for file in (model_files if self._stage == 3 else model_files[:1])]
        if self._stage == 3 and len(self._models) != len(optim_files):
            raise CheckpointError(
                f"{path}: {len(optim_files)} ranks wrote it, the model states of {len(self._models)} are here."
            )
        states = self._models[0]
        shapes: list[Mapping[str, Any]] = need(states, "param_shapes", model_files[0])
        shapes = [shapes] if isinstance(shapes, dict) else shapes
        self._shapes = {name: tuple(shape) for group in shapes for name, shape in group.items()}
        self._parts = self._parts_of_stage_3(shapes) if self._stage == 3 else self._parts_of_stage_1_and_2()
        base, flats = ("optimizer_state_dict", "fp32_flat_groups") if self._stage == 3 else _STAGE_1_AND_2
        self._base = [need(rank, base, file) for rank, file in zip(self._ranks, optim_files, strict=True)]
        self._flats = [need(rank, flats, file) for rank, file in zip(self._ranks, optim_files, strict=True)]
        if not isinstance(self._base[0], dict):
            raise CheckpointError(
                f"{path}: it was saved with elastic_checkpoint, which DeepSpeed has given up; it is not read."
            )
        groups = need(self._base[0], "param_groups", optim_files[0])
        optimizer: dict[str, Any]
        optimizer, keys = {"class": "none", "kind": "none", "groups": {}}, frozenset[str]()
        if not weights_only:
            tensors = {
                key for state in self._base[0]["state"].values() for key, value in state.items() if _is_tensor(key, value)
            }
            optimizer, keys = optimizer_kind(tensors, groups[0], path)
        self.tensors: dict[Key, Tensor] = {}
        for name, parts in self._parts.items():
            self._check(name, parts)
            rank, number, _, _ = parts[0]
            flat = {PARAM: self._flats[rank][number], **self._base[rank]["state"].get(number, {})}
            for key in (PARAM, *sorted(keys)):
                if key in flat:
                    self.tensors[name, key] = Tensor(name, key, dtype_name(flat[key].dtype), self._shapes[name])
        self._whole = self._unpartitioned(states)
        self.tensors |= {key: Tensor(*key, dtype_name(whole[0]), whole[1]) for key, whole in self._whole.items()}
        steps = {} if not keys else {name: self._step(parts[0], groups) for name, parts in self._parts.items()}
        self.record = record_of(
            states,
            path,
            format=self.format,
            optimizer=optimizer,
            scalars=step_scalars(steps),
            param_groups=groups,
            scaler=self._ranks[0].get("loss_scaler"),
            zero=self._stage,
        )

    def _parts_of_stage_1_and_2(self) -> dict[str, list[Part]]:
        """Parts in the order of the ranks follow each other in the parameter."""
        found: dict[str, list[Part]] = {}
        for rank, content in enumerate(self._ranks):
            for number, group in enumerate(need(content, "param_slice_mappings", self._files[rank])):
                for name, address in group.items():
                    if not isinstance(address, Fragment) or name not in self._shapes:
                        raise CheckpointError(f"{self._files[rank]}: the record of {name} is not what DeepSpeed writes.")
                    found.setdefault(name, []).append((rank, number, int(address.start), int(address.numel)))
        return found

    def _parts_of_stage_3(self, shapes: list[Mapping[str, Any]]) -> dict[str, list[Part]]:
        """Each rank has an equal part of each parameter, the last ones padded, in the order of the sub-groups."""
        found: dict[str, list[Part]] = {}
        dp = len(self._ranks)
        for number, group in enumerate(shapes):
            offset = 0
            for name, shape in group.items():
                numel = math.prod(shape)
                size = -(-numel // dp)
                lengths = [max(0, min(size, numel - rank * size)) for rank in range(dp)]
                found[name] = [(rank, number, offset, length) for rank, length in enumerate(lengths) if length]
                offset += size
        return {name: parts for name, parts in found.items() if parts}

    def _check(self, name: str, parts: list[Part]) -> None:
        stored, wanted = sum(numel for _, _, _, numel in parts), math.prod(self._shapes[name])
        if stored != wanted:
            raise CheckpointError(f"{self.path}: the ranks hold {stored} elements of {name}, which has {wanted}.")

    def _unpartitioned(self, states: Mapping[str, Any]) -> dict[Key, tuple[torch.dtype, tuple[int, ...]]]:
        """Type and shape of buffers and frozen parameters, which are in the model states."""
        module = states.get("module") or {}
        self._module = module
        buffers = [name for name in states.get("buffer_names") or () if name in module]
        found = {(name, BUFFER): (module[name].dtype, tuple(module[name].shape)) for name in buffers}
        self._frozen_shapes = {name: tuple(shape) for name, shape in (states.get("frozen_param_shapes") or {}).items()}
        tied = states.get("shared_params") or {}
        if self._stage == 3:
            for name, shape in self._frozen_shapes.items():
                fragment = need(states.get("frozen_param_fragments") or {}, name, self.path)
                found[name, PARAM] = (fragment.dtype, shape)
        else:
            frozen = [name for name in module if name not in self._parts and name not in buffers and name not in tied]
            found |= {(name, PARAM): (module[name].dtype, tuple(module[name].shape)) for name in frozen}
        return {key: whole for key, whole in found.items() if math.prod(whole[1])}

    def _step(self, part: Part, groups: list[Mapping[str, Any]]) -> Any:
        rank, number, _, _ = part
        state = self._base[rank]["state"].get(number, {})
        return state.get("step", groups[min(number, len(groups) - 1)].get("step"))

    def read(self, key: Key) -> torch.Tensor:
        """One whole tensor."""
        name, state = key
        if key in self._whole:
            if self._stage == 3 and state == PARAM:
                return frozen_parameter(self._models, name, self._frozen_shapes[name], self.path)
            whole: torch.Tensor = self._module[name].clone()
            return whole
        pieces = []
        for rank, number, start, numel in self._parts[name]:
            flat = self._flats[rank][number] if state == PARAM else self._base[rank]["state"][number][state]
            if start + numel > flat.numel():
                raise CheckpointError(f"{self._files[rank]}: it ends before {name} [{state}] does.")
            pieces.append(flat.reshape(-1).narrow(0, start, numel))
        return torch.cat(pieces).view(self._shapes[name])


_STAGE_1_AND_2 = ("base_optimizer_state", "single_partition_of_fp32_groups")


def _is_tensor(key: str, value: Any) -> bool:
    return isinstance(value, torch.Tensor) and key != "step" and value.dim() > 0
