"""Mixtures of experts: the load-balancing loss, and the same losses under every stage of ZeRO, dp and sp."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from helpers.fitting import train
from helpers.sampling import some

from anyshard.trainer.experts import routed

pytestmark = pytest.mark.dist

COMMON = {
    "vocab_size": 272,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.5,  # so large that a wrong one shows
    "num_experts_per_tok": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"model_type": "mixtral", **COMMON, "intermediate_size": 48, "num_local_experts": 4},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        **COMMON,
        "intermediate_size": 64,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "mlp_only_layers": [],
    },
}
STEPS = 8
BASE = [
    f"train.max_steps={STEPS}",
    "train.global_batch_size=8",
    "train.max_grad_norm=0.8",
    "model=hf",
    "data.sequence_length=32",
]


def model(name: str, **changes: Any) -> str:
    return f"model.config={{{', '.join(f'{key}: {json.dumps(value)}' for key, value in {**MODELS[name], **changes}.items())}}}"


def losses(tmp_path: Any, name: str, overrides: list[str], ranks: int) -> list[tuple[float, float]]:
    records = train(tmp_path / name, [*BASE, *overrides], ranks)
    return [(record["train/loss"], record["train/grad_norm"]) for record in records]


def same(found: list[tuple[float, float]], expected: list[tuple[float, float]]) -> None:
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], rel=1e-5)
    assert [norm for _, norm in found] == pytest.approx([norm for _, norm in expected], rel=2e-4)


LAYOUTS = {
    "dp2z0": (["zero=z0"], 2),
    "dp2z1": (["zero=z1"], 2),
    "dp2z2": (["zero=z2"], 2),
    "dp2z3": (["zero=z3"], 2),
    "sp2z1": (["zero=z1", "parallel.sp=2"], 2),
    "sp2z3": (["zero=z3", "parallel.sp=2"], 2),
    "tp2z2": (["zero=z2", "parallel.tp=2"], 2),
}
ALWAYS = ["dp2z3", "sp2z1", *some(["dp2z0", "dp2z1", "dp2z2", "tp2z2"], 1)]


@pytest.mark.parametrize(("name", "pack"), [("mixtral", "stream"), ("qwen3_moe", "documents")])
def test_losses_do_not_depend_on_the_layout(tmp_path: Any, name: str, pack: str) -> None:
    base = [model(name), f"data.pack={pack}", "train.micro_batch_size=2"]
    alone = losses(tmp_path, "alone", [*base, "zero=z0"], 1)
    for layout in ALWAYS:
        options, ranks = LAYOUTS[layout]
        same(losses(tmp_path, layout, [*base, *options], ranks), alone)


@pytest.mark.slow
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("name", list(MODELS))
def test_losses_do_not_depend_on_any_layout(tmp_path: Any, name: str, layout: str) -> None:
    base = [model(name), "train.micro_batch_size=2"]
    options, ranks = LAYOUTS[layout]
    same(losses(tmp_path, layout, [*base, *options], ranks), losses(tmp_path, "alone", [*base, "zero=z0"], 1))


def test_ranks_count_together(tmp_path: Any) -> None:
    """Two micro-batches of two sequences that count together are one of four; and not so where each counts its own."""
    base = [model("mixtral"), "zero=z1"]
    one = losses(tmp_path, "one", [*base, "train.micro_batch_size=4"], 1)
    together = ["train.micro_batch_size=2", "train.balance_experts_over=micro_step"]
    same(losses(tmp_path, "together", [*base, *together], 2), one)
    apart = losses(tmp_path, "apart", [*base, "train.micro_batch_size=2"], 2)
    assert apart[0][0] != pytest.approx(one[0][0], rel=1e-5)
    without = losses(
        tmp_path, "without", [model("mixtral", output_router_logits=False), "zero=z1", "train.micro_batch_size=4"], 1
    )
    assert one[0][0] > without[0][0] + 0.4  # 0.5 times a loss of 1 or more


def test_the_loss_is_that_of_transformers() -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    generator = torch.Generator().manual_seed(0)
    routers = tuple(torch.randn(12, 5, generator=generator) for _ in range(3))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    for counted in (mask, torch.ones_like(mask)):
        choices, probabilities = routed(routers, 2, counted.flatten() != 0)
        rows = counted.sum() * 3
        ours = 5 * (choices / rows * probabilities / rows).sum()
        assert float(ours) == pytest.approx(float(load_balancing_loss_func(routers, 5, 2, counted)), rel=1e-6)
