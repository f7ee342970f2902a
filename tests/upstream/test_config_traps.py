"""Traps of DeepSpeed's configuration: that they are still there, and that our layer catches or sets each.

Each test names the upstream file and line in its docstring (deepspeed 0.19.8). One that fails with "upstream changed"
says which workaround of ours is no longer needed.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Any

import pytest
from helpers.configs import make_config
from helpers.upstream import ds_config, still
from pydantic import ValidationError

from anyshard.configs import deepspeed_keys
from anyshard.configs.batch import plan_batch
from anyshard.configs.errors import PlanError
from anyshard.configs.rules import check
from anyshard.trainer.ds_config import compile_ds_config


def compiled(changes: dict[str, Any] | None = None) -> dict[str, Any]:
    config = make_config(changes)
    assert check(config) == []
    return compile_ds_config(config, plan_batch(config.train, 1))


def problem_keys(changes: dict[str, Any]) -> list[str]:
    return [problem.key for problem in check(make_config(changes))]


def refusal(changes: dict[str, Any]) -> str:
    problems = check(make_config(changes))
    assert len(problems) == 1, problems
    return str(problems[0])


CELLS = [
    {"zero.stage": stage, "offload.optimizer": state, "offload.param": param, "precision.dtype": dtype}
    for stage in (0, 1, 2, 3)
    for state, param in (("none", "none"), ("cpu", "none"), ("cpu", "cpu"))
    for dtype in ("bf16", "fp16", "fp32")
    if not (stage == 0 and (state == "cpu" or dtype != "fp32")) and not (stage < 3 and param == "cpu")
]


@pytest.mark.parametrize("changes", CELLS, ids=lambda changes: "-".join(map(str, changes.values())))
def test_deepspeed_accepts_what_we_compile(changes: dict[str, Any]) -> None:
    """Every legal cell parses (runtime/config.py:437), as plain JSON data and without "auto"."""
    from deepspeed.runtime.config import DeepSpeedConfig

    config = compiled(changes)
    text = json.dumps(config)
    assert "auto" not in text
    assert "null" not in text
    parsed = DeepSpeedConfig(json.loads(text))
    assert parsed.zero_optimization_stage == changes["zero.stage"]
    assert parsed.bfloat16_config.enabled == (changes["precision.dtype"] == "bf16")
    assert parsed.float16_config.enabled == (changes["precision.dtype"] == "fp16")
    offload = parsed.zero_config.offload_optimizer
    assert (offload is not None) == (changes["offload.optimizer"] == "cpu")


def test_the_version_that_was_studied_is_installed() -> None:
    """What our comments and messages cite was read in this version."""
    assert version("deepspeed").partition("+")[0] == deepspeed_keys.VERSION


def test_the_throughput_timer_synchronises_the_device_unless_it_is_off() -> None:
    """utils/config.py:38: it is on by default and waits for the device twice a step; our loop has its own."""
    timers = ds_config().timers_config
    still(
        (timers.enabled, timers.synchronized) == (True, True),
        "utils/config.py:38",
        "enabled: bool = True",
        "trainer/ds_config.py (timers)",
    )
    assert compiled()["timers"] == {"throughput": {"enabled": False}}


def test_clipping_is_on_unless_it_is_set() -> None:
    """runtime/constants.py:203: an unset gradient_clipping is 1.0 (it was 0.0 before 0.19)."""
    still(
        ds_config().gradient_clipping == 1.0,
        "runtime/constants.py:203",
        "GRADIENT_CLIPPING_DEFAULT = 1.0",
        "trainer/ds_config.py (gradient_clipping is always set)",
    )
    assert compiled({"train.max_grad_norm": 0.0})["gradient_clipping"] == 0.0
    assert ds_config(gradient_clipping=0.0).gradient_clipping == 0.0


def test_an_unknown_top_level_key_is_ignored_without_a_word() -> None:
    """runtime/config_utils.py:194: keys are looked up by name, and nobody looks at the others."""
    still(
        ds_config(zero_optimisation={"stage": 3}).zero_optimization_stage == 0,
        "runtime/config_utils.py:194",
        "return param_dict.get(param_name, param_default_value)",
        "configs/deepspeed_keys.py (KNOWN_TOP_LEVEL)",
    )
    text = refusal({"deepspeed_extra": {"zero_optimisation": {"stage": 3}}})
    assert "deepspeed_extra.zero_optimisation" in text
    assert "Did you mean deepspeed_extra.zero_optimization?" in text


def test_an_unknown_key_of_zero_is_told_by_pydantic() -> None:
    """runtime/config_utils.py:110: extra="forbid", an error after minutes of start-up and without a suggestion."""
    with pytest.raises(ValidationError) as caught:
        ds_config(zero_optimization={"stage": 1, "overlap_com": True})
    still(
        "extra_forbidden" in str(caught.value),
        "runtime/config_utils.py:110",
        'extra="forbid"',
        "configs/deepspeed_keys.py (KNOWN_ZERO)",
    )
    assert "zero_optimization.overlap_comm?" in refusal({"deepspeed_extra": {"zero_optimization": {"overlap_com": True}}})


def test_known_keys_of_zero_are_those_of_deepspeed() -> None:
    """runtime/zero/config.py:90: the fields of DeepSpeedZeroConfig, by the names that a configuration uses."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    still(
        fields == set(deepspeed_keys.KNOWN_ZERO),
        "runtime/zero/config.py:90",
        "class DeepSpeedZeroConfig",
        f"configs/deepspeed_keys.py (KNOWN_ZERO; differing: {sorted(fields ^ set(deepspeed_keys.KNOWN_ZERO))})",
    )


class _Recorder(dict[str, Any]):
    """A configuration that notes the keys it is asked for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.asked: set[str] = set()

    def __copy__(self) -> _Recorder:
        return self

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return super().keys()


def test_every_top_level_key_that_deepspeed_asks_for_is_known() -> None:
    """runtime/config.py:454: what parsing looks up, removed keys among it."""
    from deepspeed.runtime.config import DeepSpeedConfig

    recorder = _Recorder(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1, zero_optimization={"stage": 1})
    DeepSpeedConfig(recorder)
    known = {*deepspeed_keys.KNOWN_TOP_LEVEL, *deepspeed_keys.REMOVED}
    still(
        recorder.asked <= known,
        "runtime/config.py:454",
        "_reject_removed_config_keys",
        f"configs/deepspeed_keys.py (new keys: {sorted(recorder.asked - known)})",
    )
    assert len(recorder.asked) > 50


@pytest.mark.parametrize("name", sorted(deepspeed_keys.KNOWN_TOP_LEVEL))
def test_a_known_key_is_still_read_where_our_table_says(name: str) -> None:
    """configs/deepspeed_keys.py names file and line for each key."""
    from helpers.upstream import line

    where = deepspeed_keys.KNOWN_TOP_LEVEL[name]
    found = line(where).lower()
    assert name in found or name.upper() in line(where), f"upstream changed: {where} reads {found.strip()!r}, not {name}"


def test_removed_keys_are_those_that_deepspeed_refuses() -> None:
    """runtime/config.py:81 and :116."""
    from deepspeed.runtime import config

    top = set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    zero = {f"zero_optimization.{name}" for name in config._REMOVED_ZERO_CONFIG_KEYS}
    still(
        top | zero == set(deepspeed_keys.REMOVED),
        "runtime/config.py:81",
        "_REMOVED_TOP_LEVEL_CONFIG_KEYS",
        f"configs/deepspeed_keys.py (REMOVED; differing: {sorted((top | zero) ^ set(deepspeed_keys.REMOVED))})",
    )


@pytest.mark.parametrize("path", sorted(deepspeed_keys.REMOVED))
def test_a_removed_key_is_refused_by_both(path: str) -> None:
    """runtime/config.py:134: DeepSpeedConfigError, at the start of every rank; ours comes before any rank."""
    from deepspeed.runtime.config import DeepSpeedConfigError

    block, _, name = path.rpartition(".")
    keys = {block: {"stage": 1, name: 1}} if block else {name: {"enabled": True}}
    with pytest.raises(DeepSpeedConfigError):
        ds_config(**keys)
    extra = {block: {name: 1}} if block else {name: {"enabled": True}}
    assert any("DeepSpeed removed" in str(problem) for problem in check(make_config({"deepspeed_extra": extra})))


def test_auto_is_a_type_error_at_the_top_and_a_default_below() -> None:
    """runtime/config_utils.py:56: inside zero_optimization "auto" is dropped; at the top it fails later as a string."""
    dropped = ds_config(zero_optimization={"stage": 1, "reduce_bucket_size": "auto"}).zero_config.reduce_bucket_size
    still(
        dropped == 500_000_000,
        "runtime/config_utils.py:56",
        'if (v != "auto"',
        "configs/deepspeed_keys.py (refuses auto)",
    )
    with pytest.raises(TypeError):
        ds_config(train_batch_size="auto")
    for extra in ({"zero_optimization": {"leaf_module": "auto"}}, {"steps_per_print": "auto"}):
        assert "knows no 'auto'" in refusal({"deepspeed_extra": extra})


def test_precision_wants_mappings_without_nulls() -> None:
    """runtime/precision_config.py:38: `bf16: true` is a TypeError, `bf16.enabled: null` a ValidationError."""
    with pytest.raises(TypeError, match="must be a mapping") as caught:
        ds_config(bf16=True)
    with pytest.raises(ValidationError):
        ds_config(bf16={"enabled": None})
    still(
        "mapping" in str(caught.value),
        "runtime/precision_config.py:38",
        "DeepSpeedBF16Config(**bf16_config_dict)",
        "trainer/ds_config.py (bf16 and fp16 are mappings)",
    )
    assert "DeepSpeed wants a mapping here" in refusal({"deepspeed_extra": {"fp16": True}})
    for dtype in ("bf16", "fp16", "fp32"):
        config = compiled({"precision.dtype": dtype})
        assert {"bf16": config["bf16"]["enabled"], "fp16": config["fp16"]["enabled"]} == {
            "bf16": dtype == "bf16",
            "fp16": dtype == "fp16",
        }


def test_two_precisions_at_once() -> None:
    """runtime/config.py:512: an AssertionError; our precision.dtype is one name, and its switches cannot be overridden."""
    with pytest.raises(AssertionError, match="cannot be simultaneously enabled") as caught:
        ds_config(bf16={"enabled": True}, fp16={"enabled": True})
    still(bool(caught.value), "runtime/config.py:512", "cannot be simultaneously enabled", "configs/deepspeed_keys.py (OWNED)")
    assert "precision.dtype sets this" in refusal({"deepspeed_extra": {"fp16": {"enabled": True}}})


def test_an_omegaconf_is_no_dict() -> None:
    """runtime/config.py:443: a DictConfig is taken for a path; we hand over plain data only."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from omegaconf import OmegaConf

    with pytest.raises(TypeError, match="DictConfig") as caught:
        DeepSpeedConfig(OmegaConf.create({"train_batch_size": 1}))
    still(bool(caught.value), "runtime/config.py:443", "os.path.exists(config)", "trainer/ds_config.py (plain dicts)")
    assert type(compiled()) is dict
    assert type(compiled()["zero_optimization"]) is dict


@pytest.mark.parametrize(
    ("keys", "message", "where"),
    [
        ({"train_batch_size": 5}, "Check batch related parameters", "runtime/config.py:603"),
        ({"train_batch_size": 4, "train_micro_batch_size_per_gpu": 0}, "Micro batch size per gpu: 0", "runtime/config.py:598"),
        ({"train_micro_batch_size_per_gpu": None}, "Either train_batch_size", "runtime/config.py:650"),
    ],
)
def test_a_batch_that_does_not_divide_is_a_bare_assertion(keys: dict[str, Any], message: str, where: str) -> None:
    """runtime/config.py:603, :598 and :650; ours names the nearest values that work, before any rank starts."""
    with pytest.raises(AssertionError, match=message) as caught:
        ds_config(**keys)
    still(bool(caught.value), where, message.partition(":")[0], "configs/batch.py")
    config = make_config({"train.global_batch_size": 5, "train.micro_batch_size": 4})
    with pytest.raises(PlanError, match=r"Use train\.global_batch_size=4 or 8"):
        plan_batch(config.train, 1)
    assert {"train.micro_batch_size"} == set(problem_keys({"train.micro_batch_size": 0}))


def test_all_three_batch_keys_are_always_given() -> None:
    """runtime/config.py:608: with one missing DeepSpeed derives it by flooring division; we leave nothing to derive."""
    parsed = ds_config(train_batch_size=7, train_micro_batch_size_per_gpu=7, gradient_accumulation_steps=None)
    assert parsed.gradient_accumulation_steps == 1
    config = compiled({"train.global_batch_size": 24, "train.micro_batch_size": 4})
    assert [config[key] for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")] == [
        24,
        4,
        6,
    ]


def test_stage_4() -> None:
    """runtime/zero/config.py:81: an enumeration error of pydantic; ours names the key and its range."""
    with pytest.raises(ValidationError) as caught:
        ds_config(zero_optimization={"stage": 4})
    still("enum" in str(caught.value), "runtime/zero/config.py:81", "class ZeroStageEnum", "configs/schema.py (zero.stage)")
    assert problem_keys({"zero.stage": 4}) == ["zero.stage"]


@pytest.mark.parametrize(
    ("block", "changes"),
    [
        (
            {"stage": 0, "offload_optimizer": {"device": "cpu"}},
            {"zero.stage": 0, "precision.dtype": "fp32", "offload.optimizer": "cpu"},
        ),
        (
            {"stage": 2, "offload_param": {"device": "cpu"}},
            {"zero.stage": 2, "offload.optimizer": "cpu", "offload.param": "cpu"},
        ),
        (
            {"stage": 2, "offload_optimizer": {"device": "nvme"}},
            {"zero.stage": 2, "offload.optimizer": "nvme", "offload.nvme_path": "/mnt"},
        ),
        (
            {"stage": 2, "offload_optimizer": {"device": "cpu", "super_offload": True}},
            {
                "zero.stage": 2,
                "offload.optimizer": "cpu",
                "deepspeed_extra": {"zero_optimization": {"offload_optimizer": {"super_offload": True}}},
            },
        ),
    ],
    ids=["optimizer at stage 0", "param at stage 2", "nvme at stage 2", "super_offload at stage 2"],
)
def test_offload_that_a_stage_cannot_do_is_accepted_and_ignored(block: dict[str, Any], changes: dict[str, Any]) -> None:
    """runtime/zero/config.py:164: parsing accepts every combination, and the stages look only at what they know."""
    accepted = ds_config(zero_optimization=block)
    still(
        accepted.zero_optimization_stage == block["stage"],
        "runtime/zero/config.py:164",
        "offload_param: Optional",
        "configs/rules.py (_offload, _nvme, _deepspeed_extra)",
    )
    assert len(problem_keys(changes)) == 1


def test_a_partial_offload_below_stage_3() -> None:
    """runtime/zero/config.py:399: refused by a validator, as a pydantic dump."""
    with pytest.raises((ValidationError, AssertionError), match="Partial offloading") as caught:
        ds_config(zero_optimization={"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}})
    still(bool(caught.value), "runtime/zero/config.py:399", "Partial offloading only supported", "configs/rules.py (_offload)")
    assert "offload.ratio" in refusal({"zero.stage": 2, "offload.optimizer": "cpu", "offload.ratio": 0.5})


def test_a_partial_offload_steps_a_second_optimizer() -> None:
    """runtime/zero/stage3.py:317: its first group is its own, so a schedule's learning rate never arrives there."""
    still(True, "runtime/zero/stage3.py:317", "self.backup_optimizer = torch.optim.AdamW(", "configs/rules.py (_offload)")
    assert "offload.ratio" in refusal({"zero.stage": 3, "offload.optimizer": "cpu", "offload.ratio": 0.5})


def test_hpz_larger_than_the_world_is_accepted() -> None:
    """runtime/zero/config.py:324: any positive number parses; ours must divide dp."""
    parsed = ds_config(zero_optimization={"stage": 3, "zero_hpz_partition_size": 3})
    still(
        parsed.zero_config.zero_hpz_partition_size == 3,
        "runtime/zero/config.py:324",
        "zero_hpz_partition_size",
        "configs/rules.py (_hpz)",
    )
    assert problem_keys({"zero.stage": 3, "zero.hpz_partition_size": 3}) == ["zero.hpz_partition_size"]


def test_loss_scale_limits_are_whole_numbers() -> None:
    """runtime/precision_config.py:165: a fraction is refused by a validator; ours says what to set."""
    with pytest.raises(ValidationError) as caught:
        ds_config(fp16={"enabled": True, "min_loss_scale": 0.5})
    still(
        "min_loss_scale" in str(caught.value),
        "runtime/precision_config.py:165",
        'field_validator("loss_scale_window", "min_loss_scale"',
        "configs/rules.py (_precision)",
    )
    assert refusal({"precision.dtype": "fp16", "precision.min_scale": 0.5}).startswith("precision.min_scale=0.5")
    assert compiled({"precision.dtype": "fp16"})["fp16"]["min_loss_scale"] == 1


def test_universal_loading_takes_any_truth() -> None:
    """runtime/config.py:549: `load_universal: "no"` is true; the whole block is refused, since checkpoints are ours."""
    parsed = ds_config(checkpoint={"load_universal": "no"})
    still(
        bool(parsed.load_universal_checkpoint),
        "runtime/config.py:549",
        "LOAD_UNIVERSAL_CHECKPOINT",
        "configs/deepspeed_keys.py (OWNED)",
    )
    assert "checkpoint" not in compiled()
    assert "checkpoint.mode sets this" in refusal({"deepspeed_extra": {"checkpoint": {"load_universal": True}}})


def test_max_grad_norm_among_the_optimizers_parameters() -> None:
    """runtime/engine.py:2481: a ValueError at initialize; we never write an optimizer block."""
    still(True, "runtime/engine.py:2481", '"max_grad_norm" in optimizer_parameters', "configs/deepspeed_keys.py (OWNED)")
    assert "optimizer" not in compiled()
    extra = {"optimizer": {"type": "AdamW", "params": {"max_grad_norm": 1.0}}}
    keys = problem_keys({"deepspeed_extra": extra})
    assert keys
    assert all(key.startswith("deepspeed_extra.optimizer.") for key in keys)


def test_zenflow_is_refused() -> None:
    """runtime/zero/stage_1_and_2.py:889: weights are viewed again without undoing ZenFlow's transposition."""
    still(
        True,
        "runtime/zero/stage_1_and_2.py:889",
        "def _update_model_bit16_weights",
        "configs/deepspeed_keys.py (REFUSED, zenflow)",
    )
    assert "scrambles the weights" in refusal({"deepspeed_extra": {"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}})


def test_expert_parallelism_is_refused() -> None:
    """module_inject/auto_ep_presets/base.py:326: a registry of transformers is asked with a default, which 5.x lacks."""
    from transformers.utils import output_capturing

    registry = output_capturing._CAN_RECORD_REGISTRY
    with pytest.raises(TypeError) as caught:
        registry.get("key", None)
    still(
        "positional arguments" in str(caught.value),
        "module_inject/auto_ep_presets/base.py:326",
        "registry.get(registry_key, _MISSING_REGISTRY_ENTRY)",
        "configs/deepspeed_keys.py (REFUSED, expert_parallel) and configs/rules.py (parallel.ep)",
    )
    assert "cannot be used" in refusal({"deepspeed_extra": {"expert_parallel": {"enabled": True}}})


def test_a_collective_waits_ten_minutes_unless_told() -> None:
    """constants.py:19: the default timeout of a process group; ours is launch.timeout_s, always passed."""
    from datetime import timedelta

    from deepspeed.constants import default_pg_timeout

    still(
        default_pg_timeout == timedelta(minutes=10),
        "constants.py:19",
        "default_pg_timeout",
        "parallel/comm.py (init_distributed passes timeout)",
    )
