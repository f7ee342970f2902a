"""The rules of sequence parallelism, in both directions."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.configs import make_config

from anyshard.configs.rules import check
from anyshard.configs.sequence_rules import head_problem, valid_degrees

SP2: dict[str, Any] = {"parallel.sp": 2, "launch.procs_per_node": 2}
LLAMA = {"model_type": "llama", "vocab_size": 272, "max_position_embeddings": 2048}


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp", "valid"),
    [
        (8, 8, 1, [1, 2, 4, 8]),
        (8, 2, 1, [1, 2, 4, 8]),  # above 2 several ranks hold the same key-value head
        (12, 3, 1, [1, 3, 6, 12]),
        (12, 1, 1, [1, 2, 3, 4, 6, 12]),
        (8, 4, 2, [1, 2, 4]),
        (8, 1, 4, [1, 2]),
    ],
)
def test_degrees_that_divide_the_heads(heads: int, kv_heads: int, tp: int, valid: list[int]) -> None:
    assert valid_degrees(heads, kv_heads, tp=tp) == valid
    for degree in range(1, heads + 2):
        assert (head_problem(heads, kv_heads, sp=degree, tp=tp, model="m") is None) == (degree in valid)


@pytest.mark.parametrize(
    ("changes", "key", "told"),
    [
        ({"parallel.pp": 2, "launch.procs_per_node": 4}, "parallel.sp", "Set parallel.sp=1, or parallel.pp=1"),
        ({"zero.hpz_partition_size": 2, "zero.stage": 3, "parallel.dp": 1}, "zero.hpz_partition_size", "or parallel.sp=1"),
        ({"model.attention": "eager"}, "model.attention", "Use one of sdpa, flash_attention_2"),
        (
            {"model.config": {**LLAMA, "num_attention_heads": 6, "num_key_value_heads": 3}},
            "parallel.sp",
            "the model tiny has 6 heads and 3 key-value heads: every rank computes whole heads. Set it to one of 1, 3, 6.",
        ),
        ({"model.config": {"model_type": "gpt2", "n_head": 3}}, "parallel.sp", "Set it to one of 1, 3."),
        (
            {"model.config": {**LLAMA, "num_attention_heads": 4}, "parallel.tp": 4, "launch.procs_per_node": 8},
            "parallel.sp",
            "of which each of tp=4 ranks has its part: every rank computes whole heads. Set it to one of 1.",
        ),
    ],
)
def test_what_is_refused(changes: dict[str, Any], key: str, told: str) -> None:
    problems = [problem for problem in check(make_config({**SP2, **changes})) if problem.key == key]
    assert any(told in str(problem) for problem in problems), problems


def test_a_builder_of_a_plugin_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from anyshard.configs import registry

    monkeypatch.setitem(registry._REGISTERED["model"], "mine", object())
    (problem,) = check(make_config({**SP2, "model.builder": "mine"}))
    assert "model.builder=mine" in problem.reason


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"parallel.tp": 2, "launch.procs_per_node": 4},
        {"model.config": {**LLAMA, "num_attention_heads": 4, "num_key_value_heads": 1}},
        {"zero.stage": 3, "data.pack": "documents"},
        {"zero.stage": 0, "precision.dtype": "fp32", "data.sequence_length": 33},
    ],
)
def test_what_is_let_through(changes: dict[str, Any]) -> None:
    assert check(make_config({**SP2, **changes})) == []
