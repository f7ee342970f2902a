from __future__ import annotations

from typing import Any

import pytest

from anyshard.configs.errors import ConfigError
from anyshard.configs.keys import plain
from anyshard.configs.schema import Config, Dtype
from anyshard.configs.structure import structure, structure_or_raise


def test_the_defaults_survive_a_round_trip() -> None:
    assert structure(plain(Config())) == (Config(), [])


def test_nothing_set_is_the_defaults() -> None:
    assert structure_or_raise({}) == Config()


@pytest.mark.parametrize(
    ("group", "key", "given", "held"),
    [
        ("train", "max_steps", 1e6, 1_000_000),
        ("optimizer", "lr", 1, 1.0),
        ("run", "name", 7, "7"),
        ("precision", "dtype", "fp32", Dtype.fp32),
        ("parallel", "dp", "auto", "auto"),
        ("parallel", "dp", 4, 4),
        ("schedule", "warmup_steps", 0.1, 0.1),
        ("schedule", "warmup_steps", 1e3, 1000),
        ("optimizer", "betas", [0, 0.5], [0.0, 0.5]),
        ("run", "dir", None, None),
        ("launch", "env", {"A": 1}, {"A": "1"}),
    ],
)
def test_values_become_what_the_schema_says(group: str, key: str, given: Any, held: Any) -> None:
    value = getattr(getattr(structure_or_raise({group: {key: given}}), group), key)
    assert value == held
    assert type(value) is type(held)


@pytest.mark.parametrize(
    ("group", "key", "given", "said"),
    [
        ("train", "max_steps", "many", "train.max_steps=many: it is a string. Give: integer."),
        ("train", "max_steps", 1.5, "it is a number. Give: integer."),
        ("train", "max_steps", True, "it is a truth value. Give: integer."),
        ("train", "detect_nan", 1, "it is an integer. Give: true | false."),
        ("train", "max_steps", None, "it is null. Give: integer."),
        ("run", "dir", [1], "it is a list. Give: string | null."),
        ("optimizer", "betas", 0.9, "Give: list of numbers."),
        ("optimizer", "betas", ["a"], "Give: list of numbers."),
        ("model", "config", "llama", "Give: mapping."),
        ("precision", "dtype", "bf17", "Did you mean bf16? There are: bf16, fp16, fp32."),
        ("zero", "stge", 3, "zero.stge=3: there is no such key. Did you mean zero.stage?"),
    ],
)
def test_a_wrong_value_names_key_reason_and_fix(group: str, key: str, given: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        structure_or_raise({group: {key: given}})
    assert said in str(caught.value)


def test_a_choice_in_place_of_a_group_says_how_to_choose() -> None:
    with pytest.raises(ConfigError) as caught:
        structure_or_raise({"zero": "z3"})
    assert "override /zero" in str(caught.value)


def test_all_problems_come_together() -> None:
    _, problems = structure({"zero": {"stage": "x"}, "sed": 1, "train": {"max_steps": "y"}})
    assert [problem.key for problem in problems] == ["zero.stage", "sed", "train.max_steps"]
