"""From the schema to DeepSpeed's configuration: a pure function to plain JSON data, without torch or DeepSpeed.

Every key whose default is a trap is set here explicitly; nothing is "auto". The optimizer and the learning rate are ours,
so there is no optimizer or scheduler block; checkpoints are ours, so there is no checkpoint block. The gradient
accumulation type and the communication type are DeepSpeed's own choice: the type of the model.
"""

from __future__ import annotations

import copy
from typing import Any

from anyshard.configs.batch import BatchPlan
from anyshard.configs.keys import leaves
from anyshard.configs.schema import Config, Device, Dtype


def compile_ds_config(config: Config, batch: BatchPlan) -> dict[str, Any]:
    """The dict for `deepspeed.initialize`; the configuration must have passed the rules."""
    result = _base(config, batch)
    _merge(result, config.deepspeed_extra)
    return result


def merged_overrides(config: Config, batch: BatchPlan) -> list[tuple[str, Any, Any]]:
    """What `deepspeed_extra` changes: (DeepSpeed key, our value or None, the value that it gets)."""
    ours = leaves(_base(config, batch))
    return [(key, ours.get(key), value) for key, value in leaves(config.deepspeed_extra).items()]


def _base(config: Config, batch: BatchPlan) -> dict[str, Any]:
    result: dict[str, Any] = {
        # to DeepSpeed the ranks that share a sequence are data-parallel ones (parallel/sequence.py)
        "train_batch_size": batch.global_batch_size * config.parallel.sp,
        "train_micro_batch_size_per_gpu": batch.micro_batch_size,
        "gradient_accumulation_steps": batch.accumulation_steps,
        # unset, it is 1.0 since 0.19 (runtime/constants.py:203); 0.0 is off
        "gradient_clipping": config.train.max_grad_norm,
        # groups and loss are logged by us; DeepSpeed's own lines and timers synchronise the device
        "wall_clock_breakdown": False,
        "dump_state": False,
        "timers": {"throughput": {"enabled": False}},
        # the optimizer is ours: any one may be used, and the builder has chosen the CPU version where state is on CPU
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": _zero(config),
        # mappings, not booleans: `bf16: true` is a TypeError (runtime/precision_config.py:38)
        "bf16": {"enabled": config.precision.dtype is Dtype.bf16},
        "fp16": {"enabled": config.precision.dtype is Dtype.fp16},
    }
    if config.precision.dtype is Dtype.fp16:
        result["fp16"] |= {
            "loss_scale": 0.0,  # dynamic
            "initial_scale_power": config.precision.initial_scale_power,
            "loss_scale_window": config.precision.scale_window,
            "hysteresis": config.precision.hysteresis,
            "min_loss_scale": int(config.precision.min_scale),
        }
    if config.parallel.pp > 1:
        # whole activations and gradients go between stages: partitioned over tp they are gathered again on arrival
        result["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
    if config.precision.dtype is Dtype.bf16:
        # a step whose gradients are not finite is skipped, as in fp16, and does not destroy the weights
        result["bf16"]["check_grad_overflow"] = True
    return result


def _zero(config: Config) -> dict[str, Any]:
    """The zero_optimization block: only keys that mean something at this stage."""
    zero, stage = config.zero, config.zero.stage
    block: dict[str, Any] = {"stage": stage}
    if stage == 0:
        return block
    block |= {
        # the pipeline engine reduces once, after the last backward pass (runtime/pipe/engine.py:287)
        "overlap_comm": zero.overlap_comm and config.parallel.pp == 1,
        "contiguous_gradients": zero.contiguous_gradients,
        "reduce_scatter": True,
        "reduce_bucket_size": zero.reduce_bucket_size,
    }
    if stage < 3:
        block |= {
            "allgather_bucket_size": zero.allgather_bucket_size,
            "round_robin_gradients": zero.round_robin_gradients,
        }
    else:
        block |= {
            "stage3_prefetch_bucket_size": zero.prefetch_bucket_size,
            "stage3_param_persistence_threshold": zero.param_persistence_threshold,
            "stage3_max_live_parameters": zero.max_live_parameters,
            "stage3_max_reuse_distance": zero.max_reuse_distance,
            "sub_group_size": zero.sub_group_size,
            "zero_hpz_partition_size": zero.hpz_partition_size,
        }
    return block | _offload(config)


def _offload(config: Config) -> dict[str, Any]:
    offload = config.offload
    blocks: dict[str, Any] = {}
    if offload.optimizer is not Device.none:
        blocks["offload_optimizer"] = {
            "device": offload.optimizer.value,
            "pin_memory": offload.pin_memory,
            "ratio": offload.ratio,
        }
    if offload.param is not Device.none:
        blocks["offload_param"] = {"device": offload.param.value, "pin_memory": offload.pin_memory}
    for block in blocks.values():
        if block["device"] == Device.nvme.value:  # buffers and sub-groups follow from the model's parts (offload/tiers.py)
            block["nvme_path"] = offload.nvme_path
    return blocks


def _merge(target: dict[str, Any], extra: dict[str, Any]) -> None:
    for name, value in extra.items():
        if isinstance(value, dict) and isinstance(target.get(name), dict):
            _merge(target[name], value)
        else:
            target[name] = copy.deepcopy(value)
