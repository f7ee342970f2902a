"""Runs under sequence parallelism against one process: the same losses and gradient norms at every stage, and resumed."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.fitting import curve, fit_here, train
from helpers.ranks import run_ranks
from helpers.sampling import some

pytestmark = pytest.mark.dist

STEPS = 20
BASE = [
    f"train.max_steps={STEPS}",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",  # accumulation: 4 at dp 1, 2 at dp 2
    "train.max_grad_norm=0.8",
    "optimizer.weight_decay=0.1",
    "model.config.tie_word_embeddings=true",
]
SP2 = "parallel.sp=2"
STAGES = ["z0", "z1", "z2", "z3"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return train(tmp_path_factory.mktemp("reference"), [*BASE, "zero=z0"], 1)


def column(records: list[dict[str, Any]], name: str) -> list[float]:
    return [record[name] for record in records]


def check(records: list[dict[str, Any]], reference: list[dict[str, Any]]) -> None:
    assert len(records) == STEPS
    assert column(records, "train/loss") == pytest.approx(column(reference, "train/loss"), rel=1e-5)
    norms = column(records, "train/grad_norm")
    assert norms == pytest.approx(column(reference, "train/grad_norm"), rel=1e-4)
    assert max(norms) > 0.8  # clipping was at work


@pytest.mark.sampled(2)
@pytest.mark.parametrize("zero", STAGES)
def test_sp2_is_one_process(tmp_path: Any, reference: Any, zero: str) -> None:
    check(train(tmp_path, [*BASE, f"zero={zero}", SP2], 2), reference)


FOUR = [(zero, axis) for zero in STAGES for axis in ("dp", "tp")]


@pytest.mark.parametrize(
    ("zero", "axis"), [case if case in some(FOUR, 1) else pytest.param(*case, marks=pytest.mark.slow) for case in FOUR]
)
def test_sp2_beside_another_axis_is_one_process(tmp_path: Any, reference: Any, zero: str, axis: str) -> None:
    check(train(tmp_path, [*BASE, f"zero={zero}", SP2, f"parallel.{axis}=2"], 4), reference)


@pytest.mark.slow
def test_ranks_in_another_order(tmp_path: Any, reference: Any) -> None:
    check(train(tmp_path, [*BASE, "zero=z3", SP2, "parallel.order=[dp,tp,sp,pp]"], 4), reference)


@pytest.mark.slow
def test_more_ranks_than_key_value_heads(tmp_path: Any, reference: Any) -> None:
    check(train(tmp_path, [*BASE, "zero=z2", "parallel.sp=4"], 4), reference)


@pytest.mark.parametrize(("zero", "offload"), some([("z1", "cpu"), ("z2", "cpu"), ("z3", "cpu"), ("z3", "cpu_param")], 1))
def test_sp2_with_offload(tmp_path: Any, reference: Any, zero: str, offload: str) -> None:
    check(train(tmp_path, [*BASE, f"zero={zero}", f"offload={offload}", SP2], 2), reference)


@pytest.mark.parametrize("zero", some(["z1", "z2", "z3"], 1))
def test_half_precision_follows(tmp_path: Any, reference: Any, zero: str) -> None:
    """bf16 within 3 %: 8 bits of mantissa, as for data parallelism in test_parity.py."""
    losses = curve(tmp_path, [*BASE, f"zero={zero}", "precision=bf16", SP2], 2)
    assert losses == pytest.approx(column(reference, "train/loss"), rel=3e-2)


@pytest.mark.parametrize("pack", some(["stream", "documents"], 1))
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
PAIRS = [(a, b) for a in LAYOUTS for b in LAYOUTS if a != b and "sp2" in a + b]
SMALL_PAIRS = [(a, b) for a, b in PAIRS if LAYOUTS[a][1] == LAYOUTS[b][1] == 2]


def _resume(tmp_path: Any, reference: Any, first: str, second: str) -> None:
    (options, ranks), (others, more) = LAYOUTS[first], LAYOUTS[second]
    save = "checkpoint.at_end=true"
    train(tmp_path, [*BASE, *options, save, "stop.at_step=10"], ranks)
    check(train(tmp_path, [*BASE, *others, save], more), reference)


@pytest.mark.parametrize(("first", "second"), some(SMALL_PAIRS, 1))
def test_runs_resume_between_axes(tmp_path: Any, reference: Any, first: str, second: str) -> None:
    _resume(tmp_path, reference, first, second)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_runs_resume_between_all_layouts(tmp_path: Any, reference: Any, first: str, second: str) -> None:
    _resume(tmp_path, reference, first, second)


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
