"""Where a live DeepSpeed engine keeps its state: the part of every global tensor that this rank holds, as live views.

`slots` finds the full-precision value of every parameter under ZeRO 0 to 3 and any offload; `fragments` adds the optimizer's
states, the buffers and the frozen parameters. Reading a view is a save, writing into it a restore; `refresh` then makes the
parameters that the model computes with from what was written. What optimizers keep is in `optimizers.py`.

Upstream internals that this package relies on (deepspeed 0.19.8; `tests/upstream/test_checkpoint_internals.py` holds them
line by line and fails when they move):

    runtime/zero/stage_1_and_2.py   bit16_groups :354, single_partition_of_fp32_groups :364, update_lp_params :3172,
                                    _hp_optimizer_states_linked :744
    runtime/bf16_optimizer.py       bf16_groups :105, fp32_groups_flat_partition :109, update_lp_params :593,
                                    _hp_optimizer_states_linked :235
    utils/tensor_fragment.py        param._hp_mapping: lp_fragment_address :21, hp_fragment_address :23
    runtime/zero/stage3.py          fp16_groups :401, fp32_partitioned_groups_flat :416, get_param_id :1565,
                                    grad_position :1955, _reassign_or_swap_out_partitioned_parameters :2854,
                                    checkpoint_event_prologue :3844, checkpoint_event_epilogue :3847
    runtime/zero/partition_parameters.py  param.ds_tensor, ds_numel, ds_shape, ds_process_group :1302, partition_numel :1638
    runtime/engine.py               optimizer, module, global_steps :536, global_samples :537, micro_steps :538,
                                    skipped_steps :541, _config.zero_config (in `describe`)
    runtime/fp16/loss_scaler.py     loss_scaler.{dynamic, cur_scale, cur_iter, last_overflow_iter, cur_hysteresis} (manager.py)
    ops/adam/cpu_adam.py            opt_id, ds_opt_adam.adam_update (optimizers.py)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from anyshard.configs.errors import CheckpointError
from anyshard.parallel.part import part_of
from anyshard.parallel.whole import whole_of
from anyshard.trainer.checkpoint.boxes import Box, full_box
from anyshard.trainer.checkpoint.manifest import BUFFER, PARAM, Tensor
from anyshard.trainer.checkpoint.swapped import SwapFile, files_of, is_swapped, stand_in


@dataclass(frozen=True)
class Slot:
    """The part of one parameter that this rank holds at the highest precision.

    Attributes:
        shape: of the global parameter.
        start: its first element, counted in the row-major order of the shard.
        flat: the tensor that holds it, at `[offset, offset + numel)` of its elements.
        owner: `flat` as the optimizer knows it (the key of its state); None for a parameter that it does not step.
        replicated: every rank of the data-parallel group holds the same.
        shard: the box of the global parameter that tensor parallelism gave this rank; None for the whole.
        files: id of the tensors that are in swap files and not in memory -> the file.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    flat: torch.Tensor
    offset: int
    owner: torch.Tensor | None
    replicated: bool
    shard: Box | None = None
    files: Mapping[int, Path] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Fragment:
    """A live view of `numel` elements from `start` of the row-major elements of a shard of a global tensor.

    Attributes:
        shard: the box of the global tensor that an axis such as tensor parallelism gave this rank; None for the whole.
        owner: what the optimizer steps when it changes these elements; None where it never does.
        file: where the elements are while they are not in memory; the view then stands in for them, and has no values.

    Shape: view is flat, one element for each.
    """

    tensor: Tensor
    start: int
    view: torch.Tensor
    replicated: bool
    shard: Box | None = None
    owner: torch.Tensor | None = None
    file: SwapFile | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.view.numel()

    @property
    def box(self) -> Box:
        """The box that `start` counts in."""
        return full_box(self.tensor.shape) if self.shard is None else self.shard


def inner_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The optimizer that holds the states, inside DeepSpeed's wrapper if there is one."""
    optimizer = engine.optimizer
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float32` as the format calls it: "float32"."""
    return str(dtype).removeprefix("torch.")


def shape_of(param: torch.Tensor) -> tuple[int, ...]:
    """Global shape of a parameter, also where tensor parallelism or ZeRO-3 left a part of it here."""
    part = part_of(param)
    return tuple(getattr(param, "ds_shape", param.shape)) if part is None else part.shape


def _shard_of(param: torch.Tensor) -> Box | None:
    part = part_of(param)
    return None if part is None else part.box


def parameters(module: nn.Module) -> dict[nn.Parameter, str]:
    """Parameter -> canonical name, each once; those without elements have nothing to store.

    Several may be parts of one global parameter, and have its name.
    """
    return {
        param: name if (part := part_of(param)) is None else part.name
        for name, param in module.named_parameters()
        if math.prod(shape_of(param))
    }


def tied_names(module: nn.Module) -> dict[str, str]:
    """Other name -> canonical name of parameters that a model uses more than once; of a pipeline stage, in the whole model."""
    whole = whole_of(module)
    if whole is not None:
        return dict(whole.tied)
    first: dict[int, str] = {}
    every = module.named_parameters(remove_duplicate=False)
    return {name: known for name, param in every if (known := first.setdefault(id(param), name)) != name}


def persistent_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> buffer, for those that belong to the model's state."""
    places = [(name, part._buffers[key]) for name, part, key in buffer_places(module)]
    return {name: buffer for name, buffer in places if buffer is not None}


def buffer_places(module: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Name, module and key there of every persistent buffer: the tensor itself may be replaced by another."""
    found = []
    for prefix, part in module.named_modules():
        for key, buffer in part.named_buffers(recurse=False):
            if key not in part._non_persistent_buffers_set and buffer.numel():
                found.append((f"{prefix}.{key}" if prefix else key, part, key))
    return found


def global_tensors(module: nn.Module) -> dict[tuple[str, str], tuple[int, ...]]:
    """(name, state key) -> global shape of everything that a checkpoint of this model must hold, other stages included."""
    whole = whole_of(module)
    if whole is not None:
        stored = {(name, PARAM): shape for name, shape in whole.params.items() if math.prod(shape)}
        return stored | {(name, BUFFER): shape for name, shape in whole.buffers.items()}
    shapes = {(name, PARAM): shape_of(param) for param, name in parameters(module).items()}
    return shapes | {(name, BUFFER): tuple(buffer.shape) for name, buffer in persistent_buffers(module).items()}


def slots(engine: Any) -> list[Slot]:
    """The parts of all parameters that this rank holds, in the order of the optimizer's groups, frozen ones last.

    Raises:
        CheckpointError: DeepSpeed wraps the optimizer in something whose layout is not known here.
    """
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    optimizer = engine.optimizer
    names = parameters(engine.module)
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        groups, flats = optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups
        found = list(_flat_partition_slots(groups, flats, names))
    elif isinstance(optimizer, BF16_Optimizer):
        found = list(_flat_partition_slots(optimizer.bf16_groups, optimizer.fp32_groups_flat_partition, names))
        groups = optimizer.bf16_groups
    elif isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        groups = optimizer.fp16_groups
        found = list(_stage3_slots(optimizer, names))
    elif isinstance(optimizer, torch.optim.Optimizer):
        groups = [group["params"] for group in optimizer.param_groups]
        found = [_whole(names[param], param, owner=param) for group in groups for param in group]
    else:
        raise CheckpointError(
            f"The state of {type(optimizer).__name__} cannot be stored: ZeRO 0 is supported in fp32 only. "
            "Use zero=z1 for a 16-bit run (at dp 1 it costs nothing more)."
        )
    stepped = {id(param) for group in groups for param in group}
    found += [_unstepped(name, param) for param, name in names.items() if id(param) not in stepped]
    files = files_of(engine) if engine.zero_optimization_stage() == 3 else {}
    return [dataclasses.replace(slot, files=files) for slot in found] if files else found


def _flat_partition_slots(groups: Any, flats: Any, names: dict[nn.Parameter, str]) -> Iterator[Slot]:
    """ZeRO 1 and 2: one flat fp32 partition per group; a parameter's part of it is in `_hp_mapping`."""
    for group, flat in zip(groups, flats, strict=True):
        for param in group:
            mapping = param._hp_mapping
            if mapping is not None:
                here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
                place = (there.start, there.numel, flat, here.start)
                yield Slot(names[param], shape_of(param), *place, flat, replicated=False, shard=_shard_of(param))


def _stage3_slots(optimizer: Any, names: dict[nn.Parameter, str]) -> Iterator[Slot]:
    """ZeRO 3: every parameter is cut in equal parts, padded at the end; sub-groups hold them one after the other."""
    for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        for param in group:
            _, offset, _ = optimizer.grad_position[optimizer.get_param_id(param)]
            start, numel = _part_of(param)
            if numel:
                place = (start, numel, flat, offset)
                yield Slot(names[param], shape_of(param), *place, flat, replicated=False, shard=_shard_of(param))


def _part_of(param: Any) -> tuple[int, int]:
    size = param.partition_numel()
    start = size * dist.get_rank(group=param.ds_process_group)
    return start, max(0, min(size, param.ds_numel - start))


def _whole(name: str, param: torch.Tensor, *, owner: torch.Tensor | None) -> Slot:
    return Slot(name, shape_of(param), 0, param.numel(), param, 0, owner, replicated=True, shard=_shard_of(param))


def _unstepped(name: str, param: Any) -> Slot:
    """A parameter that the optimizer does not hold: frozen."""
    if not hasattr(param, "ds_tensor"):
        return _whole(name, param, owner=None)
    start, numel = _part_of(param)
    place = (start, numel, param.ds_tensor, 0)
    return Slot(name, shape_of(param), *place, None, replicated=False, shard=_shard_of(param))


def view_of(slot: Slot, tensor: torch.Tensor) -> torch.Tensor:
    """The slot's elements of a tensor that is laid out as `slot.flat` is.

    Raises:
        CheckpointError: the tensor is not contiguous, so it has no flat view.
    """
    if not tensor.is_contiguous():
        raise CheckpointError(f"{slot.name} is not contiguous in memory: call .contiguous() on it before training.")
    return tensor.detach().view(-1).narrow(0, slot.offset, slot.numel)


def param_fragment(slot: Slot) -> Fragment:
    """The value of the parameter itself."""
    return state_fragment(slot, PARAM, slot.flat)


def state_fragment(slot: Slot, key: str, state: torch.Tensor) -> Fragment:
    """A tensor state of the optimizer, where it is now."""
    tensor = Tensor(slot.name, key, dtype_name(state.dtype), slot.shape)
    path, file = slot.files.get(id(state)), None
    if path is not None:
        file = SwapFile(path, slot.offset * state.element_size())
    view = view_of(slot, state) if file is None else stand_in(slot.numel, state.dtype)
    return Fragment(tensor, slot.start, view, slot.replicated, slot.shard, slot.owner, file)


def buffer_fragments(module: nn.Module) -> list[Fragment]:
    """All persistent buffers; every rank has its own, and rank 0's are what a checkpoint holds.

    Raises:
        CheckpointError: a buffer is not contiguous.
    """
    return [buffer_fragment(name, buffer) for name, buffer in persistent_buffers(module).items()]


def buffer_fragment(name: str, buffer: torch.Tensor) -> Fragment:
    """One buffer. Raises CheckpointError where it is not contiguous."""
    shape = tuple(buffer.shape)
    slot = Slot(name, shape, 0, buffer.numel(), buffer, 0, None, replicated=False)
    return Fragment(Tensor(name, BUFFER, dtype_name(buffer.dtype), shape), 0, view_of(slot, buffer), False)


def written_buffers(engine: Any, rank: int) -> list[tuple[str, nn.Module, str]]:
    """Name, module and key of the persistent buffers that this rank writes: the first rank of each stage writes its stage's."""
    whole = whole_of(engine.module)
    if whole is None:
        return buffer_places(engine.module) if rank == 0 else []
    if engine.mpu.get_data_parallel_rank() or engine.mpu.get_tensor_model_parallel_rank():
        return []
    return [place for place in buffer_places(engine.module) if place[0] not in whole.copies]


def left_to_others(engine: Any) -> set[tuple[str, Box | None]]:
    """(name, shard) of what this rank holds and another of its tensor-parallel group, or another stage, writes.

    Of the ranks that hold the same part each writes some of them, about the same number of elements.
    """
    if engine.mpu is None:
        return set()
    tp, rank = engine.mpu.get_tensor_model_parallel_world_size(), engine.mpu.get_tensor_model_parallel_rank()
    written: dict[int, list[int]] = {}  # number of holders -> elements that each of them writes
    left: set[tuple[str, Box | None]] = set()
    whole = whole_of(engine.module)
    for param, name in parameters(engine.module).items():
        if whole is not None and name in whole.copies:
            left.add((name, _shard_of(param)))
            continue
        part = part_of(param)
        holders = tuple(range(tp)) if part is None else part.holders
        loads = written.setdefault(len(holders), [0] * len(holders))
        writer = loads.index(min(loads))
        loads[writer] += math.prod(shape_of(param))
        if holders[writer] != rank:
            left.add((name, _shard_of(param)))
    return left


def release_gathered(engine: Any) -> None:
    """Before a restore: ZeRO-3 drops the parameters that it holds gathered, so that the partitions are the only copy."""
    if engine.zero_optimization_stage() == 3:
        engine.optimizer.checkpoint_event_prologue()


@torch.no_grad()
def refresh(engine: Any) -> None:
    """After a restore: make the parameters that the model computes with from the full-precision ones.

    Collective: every rank calls it; ZeRO 1 to 3 gather on DeepSpeed's own data-parallel group and block.
    """
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        for number in range(len(optimizer.fp16_groups)):
            if is_swapped(engine, number):  # done while it was in memory
                continue
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
        optimizer.checkpoint_event_epilogue()
    elif engine.zero_optimization_stage():
        optimizer.update_lp_params()
        # the state tensors may be new ones: have DeepSpeed link its parameters to them at the next step
        optimizer._hp_optimizer_states_linked = False


def position(engine: Any) -> str:
    """Where this rank stands among those that cut the parameters; of the ranks of one data-parallel group the same."""
    tp_rank = 0 if engine.mpu is None else engine.mpu.get_tensor_model_parallel_rank()
    return f"dp {engine.dp_world_size}, tp {tp_rank} of {engine.mp_world_size}"


def describe(engine: Any) -> dict[str, Any]:
    """The layout of a live engine, for the record."""
    config = engine._config.zero_config
    mesh = getattr(engine, "anyshard_mesh", None)  # to DeepSpeed the ranks that share a sequence are data-parallel ones
    sp = 1 if mesh is None else mesh.sp
    tiers = {"offload_optimizer": config.offload_optimizer, "offload_param": config.offload_param}
    pp = getattr(engine, "num_stages", 1)
    return {
        "dp": engine.dp_world_size // sp,
        "tp": engine.mp_world_size // pp,  # DeepSpeed counts the stages among the ranks that share the model
        "pp": pp,
        "sp": sp,
        "zero": int(engine.zero_optimization_stage()),
        # the device is an enum where it was validated, and a string where it is a default
        **{key: "none" if tier is None else str(getattr(tier.device, "value", tier.device)) for key, tier in tiers.items()},
    }
