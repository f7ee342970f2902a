"""Runs under sequence parallelism against one process: the same losses and gradient norms at every stage, and resumed."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.axes import BASE, STAGES, check, check_resumed, column, pairs
from helpers.fitting import curve, fit_here, train
from helpers.ranks import run_ranks

pytestmark = pytest.mark.dist

SP2 = "parallel.sp=2"


@pytest.mark.sampled(2)
@pytest.mark.parametrize("zero", STAGES)
def test_sp2_is_one_process(tmp_path: Any, one_process: Any, zero: str) -> None:
    check(train(tmp_path, [*BASE, f"zero={zero}", SP2], 2), one_process)


FOUR = [(zero, axis) for zero in STAGES for axis in ("dp", "tp")]


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("zero", "axis"), FOUR)
def test_sp2_beside_another_axis_is_one_process(tmp_path: Any, one_process: Any, zero: str, axis: str) -> None:
    check(train(tmp_path, [*BASE, f"zero={zero}", SP2, f"parallel.{axis}=2"], 4), one_process)


@pytest.mark.slow
def test_ranks_in_another_order(tmp_path: Any, one_process: Any) -> None:
    check(train(tmp_path, [*BASE, "zero=z3", SP2, "parallel.order=[dp,tp,sp,pp]"], 4), one_process)


@pytest.mark.slow
def test_more_ranks_than_key_value_heads(tmp_path: Any, one_process: Any) -> None:
    check(train(tmp_path, [*BASE, "zero=z2", "parallel.sp=4"], 4), one_process)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("zero", "offload"), [("z1", "cpu"), ("z2", "cpu"), ("z3", "cpu"), ("z3", "cpu_param")])
def test_sp2_with_offload(tmp_path: Any, one_process: Any, zero: str, offload: str) -> None:
    check(train(tmp_path, [*BASE, f"zero={zero}", f"offload={offload}", SP2], 2), one_process)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("zero", ["z1", "z2", "z3"])
def test_half_precision_follows(tmp_path: Any, one_process: Any, zero: str) -> None:
    """bf16 within 3 %: 8 bits of mantissa, as for data parallelism in test_parity.py."""
    losses = curve(tmp_path, [*BASE, f"zero={zero}", "precision=bf16", SP2], 2)
    assert losses == pytest.approx(column(one_process, "train/loss"), rel=3e-2)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("pack", ["stream", "documents"])
def test_lengths_that_do_not_divide_evaluation_and_recomputation(tmp_path: Any, pack: str) -> None:
    base = [*BASE, "train.max_steps=6", f"data.pack={pack}", "data.sequence_length=33", "train.eval_samples=5"]
    alone = run_ranks(fit_here, 1, overrides=[*base, "zero=z0"], run_dir=str(tmp_path / "alone"))[0]
    split = run_ranks(
        fit_here,
        2,
        overrides=[*base, SP2, "train.activation_checkpointing=true", "callbacks.sample_text={prompt: 'ab', num_tokens: 4}"],
        run_dir=str(tmp_path / "split"),
    )
    assert split[0] == split[1]
    assert split[0]["evaluation"] == pytest.approx(alone["evaluation"], rel=1e-5)


LAYOUTS = {
    "dp2": (["zero=z1"], 2),
    "dp2z3": (["zero=z3"], 2),
    "sp2": ([SP2, "zero=z1"], 2),
    "sp2z3": ([SP2, "zero=z3"], 2),
    "tp2": (["parallel.tp=2", "zero=z2"], 2),
    "sp2dp2": ([SP2, "zero=z2"], 4),
    "sp2tp2z3": ([SP2, "parallel.tp=2", "zero=z3"], 4),
}


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("first", "second"), pairs(LAYOUTS, "sp"))
def test_runs_resume_between_layouts(tmp_path: Any, one_process: Any, first: str, second: str) -> None:
    check_resumed(tmp_path, one_process, LAYOUTS, first, second)


def test_the_same_layout_resumes_bit_for_bit(tmp_path: Any) -> None:
    base = [*BASE, "train.max_steps=8", SP2, "model.config.attention_dropout=0.1"]
    whole = train(tmp_path / "whole", base, 2)
    train(tmp_path / "run", [*base, "checkpoint.at_end=true", "stop.at_step=4"], 2)
    resumed = train(tmp_path / "run", base, 2)
    for name in ("train/loss", "train/grad_norm"):
        assert column(resumed, name) == column(whole, name)


def _refusals(run_dir: str) -> list[str]:
    """On a rank: what a task of the user's own, and models that mix tokens elsewhere, are told."""
    import torch
    import torch.distributed as dist
    from helpers.models import small_config

    from anyshard import compose
    from anyshard.configs.errors import ConfigError
    from anyshard.parallel.groups import create_groups
    from anyshard.parallel.topology import Mesh
    from anyshard.trainer.building import require_whole_sequences
    from anyshard.trainer.models.hf import build

    groups = create_groups(Mesh(dp=1, sp=2), dist.get_rank())
    said = []
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    for family, changes in [
        ("gemma2", {}),
        ("llama", {"rope_parameters": rope}),
        ("llama", {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3}),
        (
            "lfm2",
            {
                "model_type": "lfm2",
                "vocab_size": 272,
                "hidden_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "layer_types": ["conv", "full_attention"],
            },
        ),
        (
            "falcon",
            {"model_type": "falcon", "vocab_size": 272, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4},
        ),
    ]:
        config = small_config(family if family in ("gemma2", "llama") else "llama")
        config.model.name = family
        config.model.config = changes if "model_type" in changes else config.model.config | changes
        if family == "gemma2":
            config.model.attention = "eager"
        try:
            build(config, device=torch.device("cpu"), dtype=torch.float32, groups=groups)
            said.append(f"{family} was taken")
        except ConfigError as error:
            said.append(str(error))
    try:
        require_whole_sequences(compose([SP2, "launch.procs_per_node=2", f"run.dir={run_dir}"]))
    except ConfigError as error:
        said.append(str(error))
    return said


def test_what_cannot_be_split_says_so(tmp_path: Any) -> None:
    eager, rope, heads, convolution, alibi, own = run_ranks(_refusals, 2, run_dir=str(tmp_path))[0]
    assert "Set model.attention to one of sdpa" in eager
    assert "rotary embeddings (dynamic) depend on the length" in rope
    assert "has 3 heads: every rank computes whole heads. Set it to one of 1, 3." in heads
    assert "layers of kind conv" in convolution
    assert "does not take its attention from transformers" in alibi
    assert "the model and the loss are your own" in own
