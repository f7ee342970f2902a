"""Which layers are split, how, and what is refused: on the meta device, without ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.models import SMALL, SPLIT_ONLY
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from anyshard.configs.errors import ConfigError
from anyshard.parallel.split import Block
from anyshard.parallel.tensor_plan import Layer, TensorPlan, require, tensor_plan

ATTENTION = "model.layers.0.self_attn"


def model(text: dict[str, Any]) -> Any:
    config = AutoConfig.for_model(**text)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", [*SMALL, *SPLIT_ONLY])
def test_every_matrix_of_a_block_is_split(family: str) -> None:
    made = model({**SMALL, **SPLIT_ONLY}[family])
    plan = tensor_plan(made)
    assert plan.refused is None
    splits = plan.splits()
    whole = [n for n, p in made.named_parameters() if n not in splits and p.dim() >= 2]
    expected = {"gpt2": ["wpe"], "opt": ["embed_positions"], "mixtral": ["experts", "gate"]}.get(family, [])
    assert all(any(word in name for word in expected) for name in whole), whole
    for name, split in splits.items():
        if name.endswith("weight"):  # the blocks are the whole dim
            assert sum(block.size for block in split.blocks) == made.get_parameter(name).shape[split.dim]


def test_where_plans_come_from() -> None:
    sources = {family: tensor_plan(model({**SMALL, **SPLIT_ONLY}[family])).source for family in ("llama", "gpt2", "opt")}
    assert sources == {
        "llama": "the model's tp_plan",
        "gpt2": "parallel/plans/gpt2.yaml",
        "opt": "rules on names and shapes",
    }


def test_a_llama_with_grouped_queries() -> None:
    plan = tensor_plan(model(SMALL["llama"]))
    assert plan.layers[f"{ATTENTION}.q_proj"] == Layer("column", (Block(64, 32, fine=16),))
    assert plan.layers[f"{ATTENTION}.k_proj"] == Layer("column", (Block(32, 16, shared=True),))
    assert plan.layers[f"{ATTENTION}.o_proj"] == Layer("row", (Block(64, 32, fine=16),))
    assert plan.layers["lm_head"] == Layer("gather", (Block(272),))
    assert plan.layers["model.embed_tokens"] == Layer("vocabulary", (Block(272),))
    assert plan.summed() == []


def test_norms_of_heads_are_summed() -> None:
    assert tensor_plan(model(SMALL["qwen3"])).summed()[:2] == [f"{ATTENTION}.q_norm", f"{ATTENTION}.k_norm"]


def test_fused_and_transposed() -> None:
    plan = tensor_plan(model(SMALL["gpt2"]))
    fused = plan.layers["transformer.h.0.attn.c_attn"]
    weight, bias = fused.split_of("weight"), fused.split_of("bias")
    assert weight is not None
    assert bias is not None
    assert (weight.dim, bias.dim, len(weight.blocks)) == (1, 0, 3)
    row = plan.layers["transformer.h.0.attn.c_proj"]
    assert row.split_of("weight").dim == 0  # type: ignore[union-attr]
    assert row.split_of("bias") is None
    assert plan.divide["transformer.h.0.attn"] == {"num_heads": "heads", "split_size": "features"}


def test_heads_that_follow_each_other_stay_together() -> None:
    layer = tensor_plan(model(SPLIT_ONLY["gpt_neox"])).layers["gpt_neox.layers.0.attention.query_key_value"]
    assert layer.blocks == (Block(192, 48),)


def test_a_tied_embedding_that_cannot_be_cut_leaves_the_head_whole() -> None:
    made = model(SMALL["qwen3"])
    made.get_input_embeddings().max_norm = 1.0
    assert not {"lm_head", "model.embed_tokens"} & set(tensor_plan(made).layers)


class _Strange(nn.Module):
    """A model with a plan of its own."""

    def __init__(self, tp_plan: dict[str, str], text: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.inner = model(text or SMALL["llama"])
        self.tp_plan = {name.replace("model.", "inner.model.", 1): style for name, style in tp_plan.items()}
        self.config = self.inner.config

    def get_input_embeddings(self) -> Any:
        return self.inner.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.inner.get_output_embeddings()


@pytest.mark.parametrize(
    ("strange", "said"),
    [
        (nn.Linear(2, 2), "only Hugging Face models"),
        (
            _Strange({"model.layers.*.mlp.up_proj": "rowwise_split_input"}),
            "wants 'rowwise_split_input' for inner.model",
        ),
        (_Strange({"model.layers.*.mlp.up_proj": "colwise"}), "inner.model.layers.0.mlp would be split by column only"),
    ],
    ids=["plain", "style", "unbalanced"],
)
def test_what_is_refused(strange: nn.Module, said: str) -> None:
    plan = tensor_plan(strange)
    assert plan.refused is not None
    assert said in plan.refused
    with pytest.raises(ConfigError, match="cannot be split"):
        require(plan, 2, "strange")


def test_a_model_without_heads_or_rules_is_refused() -> None:
    bare = _Strange({})
    del bare.tp_plan
    bare.inner.model.layers = nn.ModuleList()
    assert "no rule knows the layers of _Strange" in str(tensor_plan(bare).refused)
    bare.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=8))
    assert "how many attention heads" in str(tensor_plan(bare).refused)


def test_degrees_are_refused_with_those_that_work() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.tp=3: .*q_proj\.weight has 2 x 32.*can be split into 1, 2, 4\."):
        require(tensor_plan(model(SMALL["llama"])), 3, "llama")
    require(TensorPlan("none", refused="whatever"), 1, "llama")
