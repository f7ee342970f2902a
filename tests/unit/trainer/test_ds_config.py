from __future__ import annotations

import json
from typing import Any

import pytest
from helpers.configs import make_config

from anyshard.configs.batch import plan_batch
from anyshard.configs.deepspeed_keys import KNOWN_TOP_LEVEL, KNOWN_ZERO, OWNED, extra_problems
from anyshard.configs.keys import leaves
from anyshard.trainer.ds_config import compile_ds_config, merged_overrides

FULL: list[dict[str, Any]] = [
    {"zero.stage": 0, "precision.dtype": "fp32"},
    {"zero.stage": 1, "precision.dtype": "fp16"},
    {"zero.stage": 2, "offload.optimizer": "cpu"},
    {"zero.stage": 3, "offload.optimizer": "cpu", "offload.param": "cpu"},
    {"zero.stage": 1, "parallel.pp": 2},
]


def _compile(changes: dict[str, Any]) -> dict[str, Any]:
    config = make_config(changes)
    return compile_ds_config(config, plan_batch(config.train, dp=1))


@pytest.mark.parametrize("changes", FULL)
def test_it_is_plain_json_without_auto(changes: dict[str, Any]) -> None:
    compiled = _compile(changes)
    assert json.loads(json.dumps(compiled)) == compiled
    assert "auto" not in leaves(compiled).values()
    assert None not in leaves(compiled).values()


@pytest.mark.parametrize("changes", FULL)
def test_deepspeed_knows_every_key(changes: dict[str, Any]) -> None:
    compiled = _compile(changes)
    assert set(compiled) <= set(KNOWN_TOP_LEVEL)
    assert set(compiled["zero_optimization"]) <= KNOWN_ZERO


@pytest.mark.parametrize("changes", FULL)
def test_what_a_key_of_ours_sets_is_owned_by_it(changes: dict[str, Any]) -> None:
    """So that `deepspeed_extra` cannot contradict it."""
    free = {
        *("wall_clock_breakdown", "dump_state", "timers.throughput.enabled", "bf16.check_grad_overflow", "fp16.loss_scale"),
        *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization.reduce_scatter"),
    }
    set_by_us = {key for key in leaves(_compile(changes)) if key.partition(".")[0] not in OWNED}
    assert set_by_us - free <= set(OWNED)


def test_clipping_is_always_said() -> None:
    assert _compile({"train.max_grad_norm": 0.0})["gradient_clipping"] == 0.0
    assert _compile({})["gradient_clipping"] == 1.0


def test_batch_sizes_agree() -> None:
    config = make_config({"train.global_batch_size": 48, "train.micro_batch_size": 4})
    compiled = compile_ds_config(config, plan_batch(config.train, dp=3))
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert [compiled[name] for name in sizes] == [48, 4, 4]


def test_stage_3_keys_stand_at_stage_3_only() -> None:
    for stage in (1, 2):
        block = _compile({"zero.stage": stage})["zero_optimization"]
        assert not [name for name in block if name.startswith("stage3_") or name == "sub_group_size"]
        assert "allgather_bucket_size" in block
    assert "stage3_max_live_parameters" in _compile({"zero.stage": 3})["zero_optimization"]
    assert _compile({"zero.stage": 0, "precision.dtype": "fp32"})["zero_optimization"] == {"stage": 0}


def test_every_zero_key_of_ours_reaches_deepspeed() -> None:
    changes: dict[str, Any] = {
        "zero.reduce_bucket_size": 11,
        "zero.allgather_bucket_size": 12,
        "zero.prefetch_bucket_size": 13,
        "zero.param_persistence_threshold": 14,
        "zero.max_live_parameters": 15,
        "zero.max_reuse_distance": 16,
        "zero.sub_group_size": 17,
        "zero.hpz_partition_size": 18,
        "zero.overlap_comm": False,
        "zero.contiguous_gradients": False,
        "zero.round_robin_gradients": True,
    }
    held = {}
    for stage in (2, 3):
        held |= leaves(_compile({**changes, "zero.stage": stage}), "")
    for theirs, ours in OWNED.items():
        if ours in changes:
            assert held[theirs] == changes[ours], theirs


def test_fp16_scaling() -> None:
    block = _compile({"precision.dtype": "fp16", "precision.hysteresis": 4, "precision.min_scale": 2.0})["fp16"]
    assert block["hysteresis"] == 4
    assert block["min_loss_scale"] == 2
    assert type(block["min_loss_scale"]) is int


def test_extra_is_merged_last_and_shown() -> None:
    extra = {"wall_clock_breakdown": True, "zero_optimization": {"stage3_module_granularity_threshold": 3}, "comms_logger": {}}
    config = make_config({"zero.stage": 3, "deepspeed_extra": extra})
    assert not list(extra_problems(extra))
    batch = plan_batch(config.train, dp=1)
    compiled = compile_ds_config(config, batch)
    assert compiled["wall_clock_breakdown"] is True
    assert compiled["zero_optimization"]["stage3_module_granularity_threshold"] == 3
    assert compiled["zero_optimization"]["stage"] == 3
    assert merged_overrides(config, batch) == [
        ("wall_clock_breakdown", False, True),
        ("zero_optimization.stage3_module_granularity_threshold", None, 3),
        ("comms_logger", None, {}),
    ]


def test_the_configuration_is_left_alone() -> None:
    config = make_config({"deepspeed_extra": {"a": {"b": [1]}}})
    compiled = compile_ds_config(config, plan_batch(config.train, dp=1))
    compiled["a"]["b"].append(2)
    assert config.deepspeed_extra == {"a": {"b": [1]}}


def test_stages_exchange_whole_tensors_and_reduce_gradients_once() -> None:
    compiled = _compile({"zero.stage": 1, "parallel.pp": 2})
    assert compiled["pipeline"] == {"pipe_partitioned": False, "grad_partitioned": False}
    assert compiled["zero_optimization"]["overlap_comm"] is False
    assert "pipeline" not in _compile({"zero.stage": 1})
