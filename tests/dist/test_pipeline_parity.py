"""Runs as a pipeline against one process: the same losses and gradient norms, evaluated, sampled, saved and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.axes import BASE, check, check_resumed, column, pairs
from helpers.fitting import curve, fit_here, records, train
from helpers.ranks import run_ranks

pytestmark = pytest.mark.dist

PP2, PP4, TP2, Z0, Z1 = "parallel.pp=2", "parallel.pp=4", "parallel.tp=2", "zero=z0", "zero=z1"


@pytest.mark.parametrize("zero", [Z0, Z1])
def test_two_stages_are_one_process(tmp_path: Any, one_process: Any, zero: str) -> None:
    check(train(tmp_path, [*BASE, zero, PP2], 2), one_process)


AXES = [
    ((PP2, Z0), 4),  # dp 2
    ((PP2, Z1), 4),
    ((PP2, TP2, Z0), 4),
    ((PP2, TP2, Z1), 4),
    ((PP4, Z0), 4),
    ((PP4, Z1), 4),
    ((PP2, Z1, "parallel.order=[pp,dp,tp,sp]"), 4),
    ((PP2, Z1, "parallel.pp_layers=[3,1]"), 2),
    ((PP2, Z1, "parallel.pp_balance=layers", "model.config.tie_word_embeddings=false"), 2),
    ((PP2, Z1, "parallel.pp_balance=time"), 2),
    ((PP2, Z1, "train.loss_tile_tokens=50", "train.mlp_tile_tokens=50"), 2),
    ((PP2, Z1, "offload=cpu"), 2),
    ((PP2, TP2, Z1, "offload=cpu"), 4),
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("options", "ranks"), AXES)
def test_several_axes(tmp_path: Any, one_process: Any, options: tuple[str, ...], ranks: int) -> None:
    if "model.config.tie_word_embeddings=false" in options:
        one_process = train(tmp_path / "alone", [*BASE, Z0, options[-1]], 1)
    check(train(tmp_path / "run", [*BASE, *options], ranks), one_process)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [Z0, Z1])
def test_all_three_axes(tmp_path: Any, one_process: Any, zero: str) -> None:
    check(train(tmp_path, [*BASE, zero, PP2, TP2], 8), one_process)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("axes", "ranks"), [((PP2,), 2), ((PP2,), 4), ((PP2, TP2), 4)])
def test_half_precision_follows(tmp_path: Any, one_process: Any, axes: tuple[str, ...], ranks: int) -> None:
    """bf16 within 3 %: 8 bits of mantissa, as for data parallelism in test_parity.py."""
    losses = curve(tmp_path, [*BASE, Z1, "precision=bf16", *axes], ranks)
    assert losses == pytest.approx(column(one_process, "train/loss"), rel=3e-2)


GPT2 = {"model_type": "gpt2", "vocab_size": 273, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128}
GPT2 |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
GPT2 |= {"bos_token_id": None, "eos_token_id": None}
GEMMA3 = {"model_type": "gemma3_text", "vocab_size": 273, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
GEMMA3 |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8, "pad_token_id": None}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("model", [GPT2, GEMMA3], ids=["gpt2", "gemma3"])
def test_documents_recomputed_evaluated_and_sampled(tmp_path: Any, model: dict[str, Any]) -> None:
    """Separate documents, whose targets differ in number; masks of windows; recomputation; evaluation; a sample of text."""
    fields = ", ".join(f"{name}: {json.dumps(value)}" for name, value in model.items())
    base = [
        *BASE[:-1],
        "train.max_steps=6",
        "model=hf",
        f"model.config={{{fields}}}",
        "data.pack=documents",
        "data.sequence_length=63",
    ]
    base += ["train.eval_samples=5", "train.micro_batch_size=1", "data.sequence_length=63"]
    base += ["+callbacks.sample_text={num_tokens: 4, temperature: 0}"]
    split = [*base, Z1, PP2, "train.activation_checkpointing=true"]
    alone = run_ranks(fit_here, 1, overrides=[*base, Z0], run_dir=str(tmp_path / "alone"))[0]
    stages = run_ranks(fit_here, 2, overrides=split, run_dir=str(tmp_path / "stages"))
    assert stages[0] == stages[1]
    assert stages[0]["evaluation"] == pytest.approx(alone["evaluation"], rel=1e-5)
    said = [_events(tmp_path / name, "sample")[0]["text"] for name in ("alone", "stages")]
    assert said[0] == said[1]
    curves = [column(records(tmp_path / name), "train/loss") for name in ("alone", "stages")]
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)


def _events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


LAYOUTS = {
    "dp2z3": (["zero=z3"], 2),
    "tp2z2": ([TP2, "zero=z2"], 2),
    "pp2": ([PP2, Z1], 2),
    "pp2z0": ([PP2, Z0], 2),
    "pp4": ([PP4, Z1], 4),
    "dp2pp2": ([PP2, Z1], 4),
    "pp2tp2": ([PP2, TP2, Z1], 4),
}


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("first", "second"), pairs(LAYOUTS, "pp"))
def test_runs_resume_between_layouts(tmp_path: Any, one_process: Any, first: str, second: str) -> None:
    check_resumed(tmp_path, one_process, LAYOUTS, first, second)


def test_the_same_stages_resume_bit_for_bit_and_are_exported(tmp_path: Any) -> None:
    from safetensors.torch import load_file

    from anyshard.trainer.checkpoint.interop.commands import COMMANDS

    base = [*BASE, "train.max_steps=8", PP2, Z1, "model.config.attention_dropout=0.1"]
    whole = train(tmp_path / "whole", [*base, "checkpoint.at_end=true"], 2)
    train(tmp_path / "run", [*base, "checkpoint.at_end=true", "stop.at_step=4"], 2)
    resumed = train(tmp_path / "run", [*base, "checkpoint.at_end=true"], 2)
    for name in ("train/loss", "train/grad_norm"):
        assert column(resumed, name) == column(whole, name)
    exported = []
    for name in ("whole", "run"):
        options = {"to": "hf", "dtype": None, "max_shard_bytes": 10**9, "config": None, "report": lambda done, total: None}
        COMMANDS["export"](source=str(tmp_path / name), out=str(tmp_path / f"{name}-hf"), **options)
        exported.append(load_file(tmp_path / f"{name}-hf" / "model.safetensors"))
    assert exported[0].keys() == exported[1].keys()
    assert all((exported[0][name] == exported[1][name]).all() for name in exported[0])
    assert "model.embed_tokens.weight" in exported[0]
