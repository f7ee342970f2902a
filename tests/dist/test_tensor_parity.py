"""Runs under tensor parallelism against one process: the same losses and gradient norms, whatever is split, and resumed."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from helpers.axes import BASE, STAGES, check, check_resumed, column, pairs
from helpers.fitting import TINY, curve, fit_here, train
from helpers.ranks import run_ranks

pytestmark = pytest.mark.dist

TP2 = "parallel.tp=2"


@pytest.mark.sampled(2)
@pytest.mark.parametrize("zero", STAGES)
def test_tp2_is_one_process(tmp_path: Any, one_process: Any, zero: str) -> None:
    check(train(tmp_path, [*BASE, f"zero={zero}", TP2], 2), one_process)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("zero", "offload"), [("z1", "cpu"), ("z2", "cpu"), ("z3", "cpu"), ("z3", "cpu_param")])
def test_tp2_with_offload(tmp_path: Any, one_process: Any, zero: str, offload: str) -> None:
    check(train(tmp_path, [*BASE, f"zero={zero}", f"offload={offload}", TP2], 2), one_process)


@pytest.mark.slow
@pytest.mark.parametrize("zero", STAGES)
def test_dp2_tp2_is_one_process(tmp_path: Any, one_process: Any, zero: str) -> None:
    check(train(tmp_path, [*BASE, f"zero={zero}", TP2], 4), one_process)


@pytest.mark.slow
def test_more_ranks_than_key_value_heads(tmp_path: Any, one_process: Any) -> None:
    check(train(tmp_path, [*BASE, "zero=z2", "parallel.tp=4"], 4), one_process)


@pytest.mark.slow
def test_ranks_in_another_order(tmp_path: Any, one_process: Any) -> None:
    check(train(tmp_path, [*BASE, "zero=z3", TP2, "parallel.order=[dp,tp,sp,pp]"], 4), one_process)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("zero", ["z1", "z2", "z3"])
def test_half_precision_follows(tmp_path: Any, one_process: Any, zero: str) -> None:
    """bf16 within 3 %: 8 bits of mantissa, as for data parallelism in test_parity.py."""
    losses = curve(tmp_path, [*BASE, f"zero={zero}", "precision=bf16", TP2], 2)
    assert losses == pytest.approx(column(one_process, "train/loss"), rel=3e-2)


def test_separate_documents_and_recomputation(tmp_path: Any) -> None:
    base = [*BASE, "train.max_steps=6", "data.pack=documents", "model.attention=sdpa"]
    alone = curve(tmp_path / "alone", [*base, "zero=z0"], 1)
    split = curve(tmp_path / "split", [*base, TP2, "train.activation_checkpointing=true"], 2)
    assert split == pytest.approx(alone, rel=1e-5)


GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 273,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    "bos_token_id": None,
    "eos_token_id": None,
}
QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 129,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "tie_word_embeddings": True,
}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("model", [GPT2, QWEN3], ids=["gpt2", "qwen3"])
def test_other_architectures(tmp_path: Any, model: dict[str, Any]) -> None:
    fields = ", ".join(f"{name}: {json.dumps(value)}" for name, value in model.items())
    base = [*BASE[:-1], "train.max_steps=10", "model=hf", f"model.config={{{fields}}}"]
    alone = curve(tmp_path / "alone", [*base, "zero=z0"], 1)
    assert curve(tmp_path / "split", [*base, "zero=z2", TP2], 2) == pytest.approx(alone, rel=1e-5)


def test_evaluation_is_that_of_one_process(tmp_path: Any) -> None:
    base = [*BASE, "train.max_steps=2", "train.eval_samples=5"]
    alone = run_ranks(fit_here, 1, overrides=base, run_dir=str(tmp_path / "alone"))[0]
    split = run_ranks(fit_here, 2, overrides=[*base, TP2], run_dir=str(tmp_path / "split"))
    assert split[0] == split[1]
    assert split[0]["evaluation"] == pytest.approx(alone["evaluation"], rel=1e-5)


LAYOUTS = {
    "dp2": (["zero=z1"], 2),
    "tp2": ([TP2, "zero=z2"], 2),
    "tp2z3": ([TP2, "zero=z3"], 2),
    "dp2tp2": ([TP2, "zero=z1"], 4),
    "dp2tp2z3": ([TP2, "zero=z3"], 4),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("first", "second"), pairs(LAYOUTS, "tp"))
def test_runs_resume_between_layouts(tmp_path: Any, one_process: Any, first: str, second: str) -> None:
    check_resumed(tmp_path, one_process, LAYOUTS, first, second)


def test_the_same_layout_resumes_bit_for_bit(tmp_path: Any) -> None:
    base = [*BASE, "train.max_steps=8", TP2, "model.config.attention_dropout=0.1"]
    whole = train(tmp_path / "whole", base, 2)
    train(tmp_path / "run", [*base, "checkpoint.at_end=true", "stop.at_step=4"], 2)
    resumed = train(tmp_path / "run", base, 2)
    for name in ("train/loss", "train/grad_norm"):
        assert column(resumed, name) == column(whole, name)


def _what_a_rank_sees(run_dir: str) -> dict[str, Any]:
    """On a rank: digests of its batches, of its random numbers, and of its gradients of what all ranks hold."""
    import torch

    from anyshard import compose, fit
    from anyshard.parallel.part import part_of
    from anyshard.trainer.data.build import build_data
    from anyshard.trainer.lm import build_lm_task
    from anyshard.trainer.models.hf import build
    from anyshard.trainer.signals import Signals

    overrides = [
        "train.max_steps=2",
        "train.global_batch_size=8",
        "train.micro_batch_size=2",
        "model.config.attention_dropout=0.1",
    ]
    config = compose([*TINY, f"run.dir={run_dir}", *overrides, TP2])
    seen: dict[str, list[str]] = {"batches": [], "random": [], "whole": []}

    def digest(value: Any) -> str:
        return hashlib.blake2b(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]

    def model() -> Any:
        return build(config, device=torch.device("cpu"), dtype=torch.float32)

    task = build_lm_task(config, build_data(config.data, seed=config.seed, say=lambda _: None), model)
    inner = task.loss

    def loss(engine: Any, batch: Any) -> Any:
        seen["batches"].append(digest(batch["input_ids"]))
        seen["random"].append(digest(torch.get_rng_state()))
        whole = [param for param in engine.module.parameters() if part_of(param) is None]
        seen["whole"].append(digest(torch.cat([param.detach().view(-1) for param in whole])))
        return inner(engine, batch)

    task.loss = loss
    fit(config, task, signals=Signals())
    return seen


def test_ranks_of_a_group_see_the_same_and_stay_in_step(tmp_path: Any) -> None:
    """Also a model of the user's own, built whole and split afterwards."""
    first, second, third, fourth = run_ranks(_what_a_rank_sees, 4, run_dir=str(tmp_path))
    assert first == second
    assert third == fourth
    assert first["batches"] != third["batches"]
    assert first["random"] != third["random"]
    assert first["whole"] == third["whole"]
    assert len(set(first["whole"])) == 2  # one for each step: the parameters moved
