"""Every architecture of parallel/stages.yaml, through one and two stages: logits and gradients are those of the whole model."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from anyshard.configs import schema
from anyshard.parallel.pipeline import Stage, divide, keep_stage
from anyshard.parallel.stages import known_types
from anyshard.trainer.models.hf import build

SIZES: dict[str, Any] = {
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "sliding_window": 8,
    "use_sliding_window": True,
    "max_window_layers": 1,  # the layers are not all alike
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "ffn_dim": 96,
    "word_embed_proj_dim": 32,  # projections before and after the layers
    "pad_token_id": 0,
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "attention_dropout", "hidden_dropout"), 0.0),
}


def config_of(kind: str, **changes: Any) -> schema.Config:
    known = {field.name for field in fields(CONFIG_MAPPING[kind])} | set(CONFIG_MAPPING[kind].attribute_map)
    sizes = {name: value for name, value in {**SIZES, **changes}.items() if name in known}
    attention = "eager" if kind == "gemma2" else "sdpa"  # it has no other
    model = schema.Model(config={"model_type": kind, **sizes}, name=kind, attention=attention)
    return schema.Config(model=model, data=schema.Data(sequence_length=32))


def built(config: schema.Config) -> Any:
    return build(config, device=torch.device("cpu"), dtype=torch.float32)


def packed_batch() -> dict[str, torch.Tensor]:
    """Two sequences of two documents each."""
    tokens_BS = torch.randint(1, 272, (2, 25), generator=torch.Generator().manual_seed(1))
    positions_BS = torch.stack([torch.cat([torch.arange(cut), torch.arange(24 - cut)]) for cut in (10, 17)])
    return {"input_ids": tokens_BS[:, :-1], "labels": tokens_BS[:, 1:], "position_ids": positions_BS}


def loss_of(model: Any, batch: dict[str, torch.Tensor], seen: list[torch.Tensor]) -> torch.Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    seen.append(model(**inputs, use_cache=False).logits)
    return nn.functional.cross_entropy(seen[-1].flatten(0, 1), batch["labels"].flatten())


def through_stages(
    config: schema.Config, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, int]]:
    """Logits, gradients by name (summed over the stages that share one), and how many stages hold each parameter."""
    parallel, seen = config.parallel, list[torch.Tensor]()
    stages = divide(built(config), parallel, config.model.name)
    models, outputs, inputs = [], list[torch.Tensor](), [batch["input_ids"]]
    for number in range(parallel.pp):
        model = built(config)
        keep_stage(model, stages, number)
        models.append(model)
        stage = Stage(model, first=number == 0, last=number == parallel.pp - 1)
        outputs.append(stage.run(inputs[-1], batch, lambda rest, batch: loss_of(rest, batch, seen)))
        inputs.append(outputs[-1].detach().requires_grad_())
    outputs[-1].backward()
    for number in reversed(range(parallel.pp - 1)):
        outputs[number].backward(inputs[number + 1].grad)
    gradients: dict[str, torch.Tensor] = {}
    held: dict[str, int] = {}
    for model in models:
        for name, param in model.named_parameters():
            held[name] = held.get(name, 0) + 1
            if param.grad is not None:
                gradients[name] = gradients.get(name, 0) + param.grad
    return seen[0].detach(), gradients, held


@pytest.mark.sampled(12)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("kind", known_types())
def test_stages_are_the_whole_model(kind: str, pp: int, tied: bool) -> None:
    config = config_of(kind, tie_word_embeddings=tied)
    batch, seen = packed_batch(), list[torch.Tensor]()
    whole = built(config)
    loss_of(whole, batch, seen).backward()
    config.parallel.pp = pp
    logits, gradients, held = through_stages(config, batch)
    assert torch.allclose(logits, seen[0], rtol=1e-5, atol=1e-6)
    expected = {name: param for name, param in whole.named_parameters() if param.grad is not None}
    assert set(gradients) == set(expected)
    for name, param in expected.items():
        far = float((gradients[name] - param.grad).abs().max() / param.grad.abs().max().clamp(min=1e-4))
        assert far < 1e-5, (name, far)
    is_tied = whole.get_output_embeddings().weight is whole.get_input_embeddings().weight
    assert [name for name, count in held.items() if count > 1] == (
        [next(name for name, p in whole.named_parameters() if p is whole.get_input_embeddings().weight)]
        if is_tied and pp > 1
        else []
    )


def test_the_table_has_every_preset() -> None:
    from helpers.models import SMALL

    assert {sizes["model_type"] for sizes in SMALL.values()} <= set(known_types())
