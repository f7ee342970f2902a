"""The table and the words between the planner and its child process."""

from __future__ import annotations

import io

import pytest
from torch import nn

from anyshard.configs import schema
from anyshard.configs.errors import EXIT_CONFIG, ConfigError
from anyshard.parallel.split import Block, Split
from anyshard.trainer.models import table
from anyshard.trainer.models.param_table import Param, ParamTable, read_answer, read_request, request


def _answer(model: schema.Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    monkeypatch.setattr("sys.stdin", io.StringIO(request(model, schema.Data(sequence_length=8))))
    return table.main(), capsys.readouterr().out


def test_a_request_keeps_the_groups() -> None:
    model = schema.Model(init=schema.Init.pretrained, config={"model_type": "llama"}, options={"a": 1})
    data = schema.Data(pack=schema.Pack.documents, max_tokens=3)
    assert read_request(request(model, data)) == (model, data)


def test_the_child_answers_with_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = _answer(schema.Model(config={"model_type": "gpt2", "n_layer": 1}), monkeypatch, capsys)
    answer = read_answer(text)
    assert code == 0
    assert answer.embedding_names == ("transformer.wte.weight", "transformer.wpe.weight")
    assert answer.tied == (("lm_head.weight", "transformer.wte.weight"),)
    assert answer.params[0] == Param("transformer.wte.weight", (50257, 768), split=Split(0, (Block(50257),)))
    assert answer.params[2] == Param("transformer.h.0.ln_1.weight", (768,))
    assert answer.params[0].local_numel(2) == 25129 * 768
    assert answer.params[2].local_numel(2) == 768
    assert (answer.split_source, answer.unsplittable) == ("parallel/plans/gpt2.yaml", None)
    assert answer.intermediate_size == 4 * 768
    assert max(answer.modules().values()) == 50257 * 768


def test_the_child_answers_with_the_problems(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = _answer(schema.Model(config={"model_type": "lama"}), monkeypatch, capsys)
    assert code == EXIT_CONFIG
    with pytest.raises(ConfigError, match="Did you mean llama") as caught:
        read_answer(text)
    assert caught.value.problems[0].key == "model.config.model_type"


def test_any_module_has_a_table() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False))
    model[1].requires_grad_(False)
    made = table.table_of(model)
    assert (made.num_params, made.num_trainable) == (24, 16)
    assert (made.model_type, made.hidden_size, made.max_positions) == ("custom", 0, None)
    assert made.unsplittable == "only Hugging Face models can be split."
    assert made.modules() == {"0": 16, "1": 8}
    assert ParamTable.from_json(made.to_json()) == made


def test_experts_are_counted_apart() -> None:
    model = nn.ModuleDict({"experts": nn.Linear(3, 3, bias=False), "expertise": nn.Linear(3, 3, bias=False)})
    assert table.table_of(model).num_expert_params == 9
