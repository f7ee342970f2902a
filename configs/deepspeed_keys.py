"""What may stand in `deepspeed_extra`: DeepSpeed's keys, those that are set by keys of ours, and those that it removed.

DeepSpeed ignores an unknown top-level key without a word, so the known ones are listed here, each with the place that
reads it (`Source:` file:line below the package `deepspeed`). tests/upstream compares the lists with the installed version.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from anyshard.configs.errors import Problem
from anyshard.configs.keys import leaves

VERSION = "0.19.8"

KNOWN_TOP_LEVEL: dict[str, str] = {
    "activation_checkpointing": "runtime/activation_checkpointing/config.py:45",
    "aio": "runtime/swap_tensor/constants.py:18",
    "autotuning": "autotuning/constants.py:41",
    "bf16": "runtime/precision_config.py:30",
    "bfloat16": "runtime/precision_config.py:31",
    "checkpoint": "runtime/constants.py:351",
    "comet": "monitor/config.py:13",
    "comms_logger": "comm/config.py:22",
    "communication_data_type": "runtime/constants.py:215",
    "compile": "runtime/config.py:584",
    "csv_monitor": "monitor/config.py:13",
    "data_efficiency": "runtime/data_pipeline/constants.py:9",
    "data_types": "runtime/constants.py:383",
    "dataloader_drop_last": "runtime/constants.py:402",
    "datastates_ckpt": "datastates/config.py:11",
    "disable_allgather": "runtime/constants.py:276",
    "disable_python_gc": "runtime/constants.py:300",
    "dump_state": "runtime/constants.py:288",
    "expert_parallel": "runtime/config.py:50",
    "flops_profiler": "profiling/constants.py:26",
    "fp16": "runtime/precision_config.py:92",
    "gradient_accumulation_steps": "runtime/constants.py:71",
    "gradient_allreduce_op": "runtime/constants.py:261",
    "gradient_clipping": "runtime/constants.py:202",
    "gradient_predivide_factor": "runtime/constants.py:254",
    "hybrid_engine": "runtime/config.py:370",
    "log_level": "runtime/constants.py:422",
    "managed_gradient_accumulation": "runtime/constants.py:78",
    "memory_breakdown": "runtime/constants.py:327",
    "optimizer": "runtime/constants.py:25",
    "pipeline": "runtime/config.py:283",
    "prescale_gradients": "runtime/constants.py:247",
    "scheduler": "runtime/constants.py:31",
    "seq_parallel_communication_data_type": "runtime/constants.py:228",
    "sequence_parallel_size": "runtime/config.py:468",
    "steps_per_print": "runtime/constants.py:45",
    "tensor_parallel": "runtime/tensor_parallel/config.py:151",
    "tensorboard": "monitor/config.py:13",
    "timers": "utils/config.py:23",
    "torch_autocast": "runtime/constants.py:186",
    "train_batch_size": "runtime/constants.py:19",
    "train_micro_batch_size_per_gpu": "runtime/constants.py:59",
    "use_data_before_expert_parallelism": "runtime/constants.py:419",
    "vocabulary_size": "runtime/constants.py:312",
    "wall_clock_breakdown": "runtime/constants.py:324",
    "wandb": "monitor/config.py:13",
    "weight_quantization": "runtime/config.py:582",
    "zero_allow_untested_optimizer": "runtime/constants.py:39",
    "zero_force_ds_cpu_optimizer": "runtime/constants.py:41",
    "zero_optimization": "runtime/zero/config.py:57",
}
"""Top-level keys that DeepSpeed reads, and where."""

REMOVED: dict[str, str] = {
    "amp": "use precision=bf16 or precision=fp16",
    "compression_training": "remove it",
    "curriculum_learning": "remove it",
    "eigenvalue": "remove it",
    "elasticity": "resume the run on another number of ranks instead",
    "graph_harvesting": "remove it",
    "nebula": "remove it; checkpoints are written by this program",
    "progressive_layer_drop": "remove it",
    "quantize_training": "remove it",
    "sparse_attention": "use model.attention",
    "sparse_gradients": "remove it",
    "zero_optimization.mics_hierarchical_params_gather": "use zero.hpz_partition_size",
    "zero_optimization.mics_shard_size": "use zero.hpz_partition_size",
    "zero_optimization.zeropp_loco_param": "remove it",
}
"""Features that DeepSpeed removed, and what to do. Source: runtime/config.py:81 and :116, upstream issue 8489."""

OWNED: dict[str, str] = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size",
    "gradient_clipping": "train.max_grad_norm",
    "bf16.enabled": "precision.dtype",
    "bfloat16": "precision.dtype",
    "fp16.enabled": "precision.dtype",
    "fp16.initial_scale_power": "precision.initial_scale_power",
    "fp16.loss_scale_window": "precision.scale_window",
    "fp16.hysteresis": "precision.hysteresis",
    "fp16.min_loss_scale": "precision.min_scale",
    "optimizer": "optimizer.name",
    "scheduler": "schedule.name",
    "tensor_parallel": "parallel.tp",
    "pipeline": "parallel.pp",
    "sequence_parallel_size": "parallel.sp",
    "activation_checkpointing": "train.activation_checkpointing",
    "checkpoint": "checkpoint.mode",
    "datastates_ckpt": "checkpoint.mode",
    "wandb": "tracking.name",
    "tensorboard": "tracking.name",
    "csv_monitor": "tracking.name",
    "comet": "tracking.name",
    "zero_optimization.stage": "zero.stage",
    "zero_optimization.overlap_comm": "zero.overlap_comm",
    "zero_optimization.contiguous_gradients": "zero.contiguous_gradients",
    "zero_optimization.reduce_bucket_size": "zero.reduce_bucket_size",
    "zero_optimization.allgather_bucket_size": "zero.allgather_bucket_size",
    "zero_optimization.round_robin_gradients": "zero.round_robin_gradients",
    "zero_optimization.stage3_prefetch_bucket_size": "zero.prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold": "zero.param_persistence_threshold",
    "zero_optimization.stage3_max_live_parameters": "zero.max_live_parameters",
    "zero_optimization.stage3_max_reuse_distance": "zero.max_reuse_distance",
    "zero_optimization.sub_group_size": "zero.sub_group_size",
    "zero_optimization.zero_hpz_partition_size": "zero.hpz_partition_size",
    "zero_optimization.offload_optimizer.device": "offload.optimizer",
    "zero_optimization.offload_optimizer.nvme_path": "offload.nvme_path",
    "zero_optimization.offload_optimizer.pin_memory": "offload.pin_memory",
    "zero_optimization.offload_optimizer.ratio": "offload.ratio",
    "zero_optimization.offload_param.device": "offload.param",
    "zero_optimization.offload_param.nvme_path": "offload.nvme_path",
    "zero_optimization.offload_param.pin_memory": "offload.pin_memory",
    "zero_optimization.cpu_offload": "offload.optimizer",
    "zero_optimization.cpu_offload_param": "offload.param",
    "zero_optimization.cpu_offload_use_pin_memory": "offload.pin_memory",
}
"""Keys of DeepSpeed, or whole blocks, that a key of ours sets."""

REFUSED: dict[str, str] = {
    "managed_gradient_accumulation": "the training loop relies on DeepSpeed's accumulation.",
    "data_efficiency": "the order of the data is a function of the seed here.",
    "expert_parallel": "it fails with transformers 5 (module_inject/auto_ep_presets/base.py:326).",
    "zero_optimization.zenflow": "it scrambles the weights at stages 1 and 2 (stage_1_and_2.py:889).",
    "zero_optimization.compute_grad_norm": "the gradient norm is logged and clipped.",
    "bf16.bf16_master_weights_and_grads": "masters are always fp32 here.",
    "bf16.bf16_optimizer_states": "masters and states are always fp32 here.",
    "fp16.fp16_master_weights_and_grads": "masters are always fp32 here.",
}
"""Keys of DeepSpeed that cannot work under this program, and why."""

KNOWN_ZERO: frozenset[str] = frozenset(
    [
        "allgather_bucket_size",
        "allgather_partitions",
        "compute_grad_norm",
        "contiguous_gradients",
        "cpu_offload",
        "cpu_offload_param",
        "cpu_offload_use_pin_memory",
        "elastic_checkpoint",
        "enable_sanity_checks",
        "ignore_unused_parameters",
        "leaf_module",
        "legacy_stage1",
        "load_from_fp32_weights",
        "log_trace_cache_warnings",
        "memory_efficient_linear",
        "offload_optimizer",
        "offload_param",
        "overlap_comm",
        "override_module_apply",
        "parameter_alignment",
        "pipeline_loading_checkpoint",
        "reduce_bucket_size",
        "reduce_scatter",
        "round_robin_gradients",
        "save_muon_momentum_buffer_in_memory",
        "stage",
        "stage3_allgather_sequential",
        "stage3_gather_16bit_weights_on_model_save",
        "stage3_gather_fp16_weights_on_model_save",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_model_persistence_threshold",
        "stage3_module_granularity_threshold",
        "stage3_param_persistence_threshold",
        "stage3_prefetch_bucket_size",
        "stage3_use_all_reduce_for_fetch_params",
        "sub_group_size",
        "use_multi_rank_bucket_allreduce",
        "zenflow",
        "zero_hpz_partition_size",
        "zero_quantized_gradients",
        "zero_quantized_nontrainable_weights",
        "zero_quantized_weights",
    ]
)
"""Keys below zero_optimization. Source: runtime/zero/config.py:90 (DeepSpeedZeroConfig)."""


def extra_problems(extra: dict[str, Any]) -> Iterator[Problem]:
    """What is wrong with `deepspeed_extra`, one problem a key."""
    for name, value in extra.items():
        if name not in KNOWN_TOP_LEVEL and name not in REMOVED:
            yield _unknown(name, value, list(KNOWN_TOP_LEVEL), "DeepSpeed would ignore it without a word.")
            continue
        yield from _leaf_problems(name, value)
    block = extra.get("zero_optimization")
    zero = block if isinstance(block, dict) else {}
    for name in zero:
        path = f"zero_optimization.{name}"
        if name not in KNOWN_ZERO and path not in REMOVED:
            yield _unknown(
                path, zero[name], [f"zero_optimization.{known}" for known in KNOWN_ZERO], "DeepSpeed would refuse it."
            )


def _leaf_problems(name: str, value: Any) -> Iterator[Problem]:
    for path, item in leaves(value, name).items():
        key = f"deepspeed_extra.{path}"
        if removed := _lookup(path, REMOVED):
            yield Problem(key, item, f"DeepSpeed removed {removed}.", f"Instead: {REMOVED[removed]}.")
        elif owned := _lookup(path, OWNED):
            yield Problem(key, item, f"{OWNED[owned]} sets this.", f"Set {OWNED[owned]} instead.")
        elif refused := _lookup(path, REFUSED):
            yield Problem(key, item, f"it cannot be used: {REFUSED[refused]}", "Remove it.")
        elif item == "auto":
            yield Problem(
                key, item, "DeepSpeed knows no 'auto' (it is a convention of Hugging Face's Trainer).", "Give a value."
            )
        elif name in ("bf16", "fp16", "zero_optimization") and not isinstance(value, dict):
            yield Problem(key, item, "DeepSpeed wants a mapping here.", f"Set keys below it: {key}.KEY=...")


def _lookup(path: str, table: dict[str, str]) -> str | None:
    """The entry of the table that the path is or lies below."""
    return next((entry for entry in table if path == entry or path.startswith(f"{entry}.")), None)


def _unknown(path: str, value: Any, known: list[str], consequence: str) -> Problem:
    near = difflib.get_close_matches(path, known, n=1)
    hint = f"Did you mean deepspeed_extra.{near[0]}? " if near else ""
    return Problem(
        f"deepspeed_extra.{path}", value, f"DeepSpeed {VERSION} has no such key; {consequence}", f"{hint}Remove or correct it."
    )
