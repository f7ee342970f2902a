from __future__ import annotations

import pytest

from anyshard.configs.compose import compose_with_sources
from anyshard.configs.errors import ConfigError
from anyshard.configs.explain import DEFAULT_SOURCE, explain, source_of

COMPOSITION = compose_with_sources(["experiment=cpu_quickstart", "zero=z2", "seed=7", "deepspeed_extra={steps_per_print: 5}"])


@pytest.mark.parametrize(
    ("path", "value", "source"),
    [
        ("zero.stage", 2, "configs/zero/z2.yaml"),
        ("seed", 7, "override seed=7"),
        ("launch.procs_per_node", 2, "configs/experiment/cpu_quickstart.yaml"),
        ("zero.overlap_comm", True, DEFAULT_SOURCE),
        ("model.config.vocab_size", 4096, "configs/model/llama_15m.yaml"),
        ("deepspeed_extra.steps_per_print", 5, "override deepspeed_extra={steps_per_print: 5}"),
    ],
)
def test_value_and_source_of_a_key(path: str, value: object, source: str) -> None:
    (explanation,) = explain(path, COMPOSITION)
    assert (explanation.path, explanation.value, explanation.source) == (path, value, source)


def test_a_group_is_all_its_keys() -> None:
    assert [explanation.path for explanation in explain("stop", COMPOSITION)] == ["stop.at_step", "stop.at_s", "stop.margin_s"]


def test_an_empty_mapping_is_explained_itself() -> None:
    assert [explanation.path for explanation in explain("launch.env", COMPOSITION)] == ["launch.env"]


def test_a_mapping_is_all_its_leaves() -> None:
    assert "model.config.hidden_size" in [explanation.path for explanation in explain("model.config", COMPOSITION)]


@pytest.mark.parametrize(
    ("path", "said"), [("zero.stge", "zero.stage"), ("model.config.nothing", "no such key"), ("lr", "optimizer.lr")]
)
def test_an_unknown_key(path: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        explain(path, COMPOSITION)


def test_a_group_choice_is_not_the_source_of_its_keys() -> None:
    assert source_of("zero.overlap_comm", {"zero": "override zero=z2"}) == DEFAULT_SOURCE
