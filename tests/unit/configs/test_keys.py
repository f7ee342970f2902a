from __future__ import annotations

import pytest

from anyshard.configs.keys import all_keys, find, flatten, leaves, nearest, plain
from anyshard.configs.schema import GROUPS, Config


def test_every_key_says_what_it_does() -> None:
    for key in all_keys().values():
        assert key.doc.endswith("."), key.path
        assert key.type_text, key.path


EMPTY_FOR_NO_REASON = {
    *("model.options", "data.options", "optimizer.options", "tracking.tags"),
    *("launch.env", "launch.deepspeed.launcher_args"),
    *("launch.slurm.container_mounts", "launch.slurm.modules", "launch.slurm.prologue"),
    *("launch.slurm.directives", "launch.slurm.srun_args"),
}
"""Keys that add what somebody wants to add: where nobody does, there is nothing to explain."""


def test_every_default_has_a_reason() -> None:
    assert {key.path for key in all_keys().values() if not key.why} == EMPTY_FOR_NO_REASON
    for path in EMPTY_FOR_NO_REASON:
        assert all_keys()[path].default in ("", [], {}), path


def test_reasons_fit_a_cell() -> None:
    for key in all_keys().values():
        assert len(key.why.split()) <= 15, key.path
        assert "\n" not in key.why, key.path
        assert not key.why.endswith("."), key.path


def test_what_null_means_is_said() -> None:
    for key in all_keys().values():
        assert key.default is not None or key.why.startswith("null: "), key.path


WITHOUT_UNIT = {
    *("seed", "zero.stage", "launch.port", "launch.deepspeed.node_rank"),  # names and ordinals
    *("data.validation_fraction", "offload.ratio", "schedule.min_lr_ratio", "launch.slow_factor"),  # shares
    *("precision.initial_scale_power", "precision.min_scale", "train.max_grad_norm"),
    *(f"optimizer.{name}" for name in ("lr", "betas", "eps", "momentum", "weight_decay")),
}


def test_every_quantity_has_a_unit() -> None:
    numbers = {key.path for key in all_keys().values() if "integer" in key.type_text or "number" in key.type_text}
    assert {path for path in numbers if not all_keys()[path].unit} == WITHOUT_UNIT


def test_every_number_has_a_range() -> None:
    for key in all_keys().values():
        if key.type_text.startswith(("integer", "number")):
            assert key.range_text, key.path


def test_defaults_are_within_their_ranges() -> None:
    for key in all_keys().values():
        if isinstance(key.default, (int, float)):
            assert key.ge is None or key.default >= key.ge, key.path
            assert key.gt is None or key.default > key.gt, key.path
            assert key.le is None or key.default <= key.le, key.path


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("parallel.dp", "integer | auto"),
        ("schedule.warmup_steps", "integer | number"),
        ("checkpoint.mode", "sync | async"),
        ("run.dir", "string | null"),
        ("optimizer.betas", "list of numbers"),
        ("callbacks", "mapping"),
        ("train.detect_nan", "true | false"),
    ],
)
def test_types_in_words(path: str, text: str) -> None:
    assert all_keys()[path].type_text == text


def test_range_in_words() -> None:
    assert all_keys()["offload.ratio"].range_text == "> 0, <= 1"
    assert all_keys()["run.dir"].range_text == ""


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("zero.stge", "zero.stage"),
        ("lr", "optimizer.lr"),
        ("train.lr", "optimizer.lr"),
        ("tp", "parallel.tp"),
        ("modle", "model"),
        ("train.max_step", "train.max_steps"),
        ("checkpoints.dir", "checkpoint.dir"),
        ("xyzzy", None),
    ],
)
def test_nearest_key(wrong: str, meant: str | None) -> None:
    assert nearest(wrong) == meant


def test_find_sees_into_open_mappings_only() -> None:
    inside = find("model.config.hidden_size")
    assert inside is not None
    assert inside.path == "model.config"
    assert find("zero.stage.x") is None
    assert find("zero") is None


def test_flatten_lists_every_key_and_the_leaves_of_mappings() -> None:
    config = Config()
    config.deepspeed_extra = {"a": {"b": 1}}
    flat = flatten(config)
    assert flat["deepspeed_extra.a.b"] == 1
    assert flat["precision.dtype"] == "bf16"
    assert set(all_keys()) - set(flat) == {key.path for key in all_keys().values() if key.is_open and key.path not in flat}


def test_plain_is_yaml_data() -> None:
    data = plain(Config())
    assert set(GROUPS) <= set(data)
    assert data["checkpoint"]["mode"] == "async"


def test_leaves_keep_empty_mappings() -> None:
    assert leaves({"a": {}, "b": {"c": [1]}}) == {"a": {}, "b.c": [1]}
    assert leaves({}) == {}
