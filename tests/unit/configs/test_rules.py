"""Each rule in both directions: what it refuses, and the nearest thing that it lets through."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.configs import make_config

from anyshard.configs import rules
from anyshard.configs.errors import ConfigError
from anyshard.configs.rules import check, check_dimensions, require
from anyshard.configs.schema import Config

REFUSED: list[tuple[dict[str, Any], str, str]] = [
    # ranges, from the schema
    ({"optimizer.lr": -1.0}, "optimizer.lr", "Give: number >= 0."),
    ({"train.max_steps": 0}, "train.max_steps", "Give: integer > 0 (steps)."),
    ({"offload.ratio": 1.5, "zero.stage": 3, "offload.optimizer": "cpu"}, "offload.ratio", "> 0, <= 1"),
    ({"optimizer.lr": float("nan")}, "optimizer.lr", "out of range"),
    ({"stop.at_s": float("inf")}, "stop.at_s", "out of range"),
    ({"zero.stage": 4}, "zero.stage", ">= 0, <= 3"),
    ({"parallel.dp": 0}, "parallel.dp", "Give: integer | auto >= 1 (ranks)."),
    ({"launch.procs_per_node": 0}, "launch.procs_per_node", "Give: integer | auto >= 1 (ranks)."),
    ({"launch.slurm.warn_s": 65536}, "launch.slurm.warn_s", "Give: integer >= 10, <= 65535 (s)."),
    ({"parallel.dp": "all"}, "parallel.dp", "positive integer or auto"),
    ({"launch.procs_per_node": "two"}, "launch.procs_per_node", "positive integer or auto"),
    # names
    ({"optimizer.name": "adam"}, "optimizer.name", "Did you mean adamw? There are: adagrad, adamw, lion, sgd."),
    ({"schedule.name": "cosin"}, "schedule.name", "Did you mean cosine?"),
    ({"data.source": "txt"}, "data.source", "Did you mean text?"),
    ({"model.builder": "tf"}, "model.builder", "no model of this name"),
    ({"launch.name": "lokal"}, "launch.name", "Did you mean local?"),
    ({"callbacks": {"profilr": {}}}, "callbacks.profilr", "Did you mean profiler?"),
    ({"callbacks": {"profiler": True}}, "callbacks.profiler", "callbacks.profiler={} to turn it on"),
    ({"tracking.name": "wandbb"}, "tracking.name", "Did you mean wandb?"),
    ({"run.name": "a/b"}, "run.name", "run.dir takes any path"),
    # what is not there yet
    ({"parallel.pp": 2, "launch.procs_per_node": 2, "zero.stage": 2}, "zero.stage", "shards optimizer states only"),
    ({"parallel.ep": 2}, "parallel.ep", "zero=z3 shards the experts"),
    ({"parallel.sp": 2, "launch.procs_per_node": 2, "model.attention": "eager"}, "model.attention", "Use one of sdpa"),
    ({"parallel.pp": 2, "parallel.sp": 2, "launch.procs_per_node": 4}, "parallel.sp", "cannot split sequences as well"),
    ({"parallel.sp": 2, "launch.procs_per_node": 2, "model.attention": "eager"}, "model.attention", "Use one of sdpa"),
    # ranks and batch
    ({"launch.nodes": 2, "launch.min_nodes": 3}, "launch.min_nodes", "Set it to at most 2"),
    ({"launch.nodes": 2, "launch.max_nodes": 1}, "launch.max_nodes", "Set it to at least 2"),
    (
        {"parallel.dp": 4, "launch.procs_per_node": 2},
        "parallel.dp",
        "Set parallel.dp=2 or auto, or start launch.procs_per_node=4.",
    ),
    ({"parallel.dp": 4, "parallel.tp": 3, "launch.procs_per_node": 2}, "parallel.dp", "Set parallel.dp=auto, or start"),
    ({"parallel.tp": 3, "launch.procs_per_node": 2}, "launch.procs_per_node", "Start a multiple of 3 ranks."),
    ({"parallel.order": ["tp", "dp"]}, "parallel.order", "such as [tp,sp,pp,dp]"),
    ({"parallel.order": ["tp", "tp", "pp", "dp"]}, "parallel.order", "in it once"),
    (
        {"zero.hpz_partition_size": 2, "zero.stage": 3, "parallel.tp": 2, "launch.procs_per_node": 4},
        "zero.hpz_partition_size",
        "Set it to 1, or parallel.tp=1.",
    ),
    ({"train.global_batch_size": 30}, "train.global_batch_size", "28 or 32"),
    (
        {"train.global_batch_size": 12, "launch.procs_per_node": 2},
        "train.global_batch_size",
        "8 or 16, or train.micro_batch_size=3",
    ),
    # precision
    ({"zero.stage": 0}, "zero.stage", "Use zero=z1, or precision=fp32."),
    ({"zero.stage": 0, "precision.dtype": "fp16"}, "zero.stage", "in fp16"),
    ({"precision.dtype": "fp16", "precision.min_scale": 0.5}, "precision.min_scale", "Set precision.min_scale=1."),
    (
        {"precision.dtype": "fp16", "precision.min_scale": 64.0, "precision.initial_scale_power": 5},
        "precision.min_scale",
        "2**5",
    ),
    ({"precision.dtype": "fp32", "model.attention": "flash_attention_2"}, "model.attention", "Use precision=bf16 or sdpa."),
    # offload
    ({"offload.optimizer": "cpu", "zero.stage": 0, "precision.dtype": "fp32"}, "offload.optimizer", "ignores it at stage 0"),
    ({"offload.param": "cpu", "offload.optimizer": "cpu", "zero.stage": 2}, "offload.param", "Use zero=z3, or offload=cpu."),
    ({"offload.param": "cpu", "zero.stage": 3}, "offload.param", "Use offload=cpu_param"),
    ({"offload.optimizer": "nvme", "offload.nvme_path": "/mnt"}, "offload.optimizer", "keeps it in host memory without a word"),
    ({"offload.optimizer": "nvme", "zero.stage": 3}, "offload.nvme_path", "such as /mnt/nvme, or use offload=cpu"),
    (
        {"offload.param": "nvme", "offload.optimizer": "cpu", "zero.stage": 3, "offload.nvme_path": " "},
        "offload.nvme_path",
        "needs a place",
    ),
    (
        {"offload.optimizer": "nvme", "zero.stage": 3, "offload.nvme_path": "/mnt", "optimizer.name": "adagrad"},
        "optimizer.name",
        "or an optimizer of adamw, lion, sgd",
    ),
    ({"offload.overlap": "writes"}, "offload.overlap", "Set one of none, read, write, both."),
    (
        {
            "offload.param": "nvme",
            "offload.optimizer": "cpu",
            "zero.stage": 3,
            "offload.nvme_path": "/mnt",
            "zero.hpz_partition_size": 2,
            "launch.procs_per_node": 2,
        },
        "zero.hpz_partition_size",
        "Set it to 1, or offload.param=cpu.",
    ),
    ({"offload.ratio": 0.5, "offload.optimizer": "cpu", "zero.stage": 3}, "offload.ratio", "a second optimizer"),
    ({"zero.hpz_partition_size": 2}, "zero.hpz_partition_size", "Use zero=z3"),
    (
        {"zero.hpz_partition_size": 3, "zero.stage": 3, "launch.procs_per_node": 4},
        "zero.hpz_partition_size",
        "does not divide dp=4. Use one of 1, 2, 4.",
    ),
    # schedule and optimizer
    (
        {"checkpoint.best_metric": "loss", "train.eval_every_steps": 0},
        "train.eval_every_steps",
        "Set it, or checkpoint.best_metric=null.",
    ),
    ({"checkpoint.best_metric": "loss", "train.eval_samples": 0}, "train.eval_samples", "checkpoint.best_metric=loss needs"),
    ({"checkpoint.ram_every_steps": 1, "launch.nodes": 2}, "checkpoint.ram_every_steps", "Set it to 0, or launch.nodes=1."),
    ({"schedule.warmup_steps": 2000}, "schedule.warmup_steps", "Set it to at most 1000"),
    ({"schedule.warmup_steps": 1.5}, "schedule.warmup_steps", "Write an integer for steps (2)"),
    ({"schedule.name": "wsd", "schedule.decay_steps": 2000}, "schedule.decay_steps", "train.max_steps=1000"),
    (
        {"schedule.name": "wsd", "schedule.decay_steps": 0.6, "schedule.warmup_steps": 500},
        "schedule.decay_steps",
        "Shorten one",
    ),
    ({"optimizer.betas": [0.9]}, "optimizer.betas", "two numbers"),
    ({"optimizer.name": "lion", "optimizer.betas": [0.9, 1.0]}, "optimizer.betas", "two numbers"),
    # model and data
    ({"model.init": "pretrained"}, "model.init", "Set model.path"),
    ({"model.config": {}}, "model.path", "Choose a preset"),
    ({"model.config": {"hidden_size": 64}}, "model.config", "Set model.config.model_type"),
    ({"data.sequence_length": 4096}, "data.sequence_length", "Set it to at most 2048."),
    ({"model.config": {"model_type": "gpt2", "n_positions": 128}}, "data.sequence_length", "at most 128"),
    ({"model.config": {"model_type": "llama", "vocab_size": 256}}, "data.tokenizer", "model.config.vocab_size=257"),
    ({"data.tokenizer": "bpe"}, "data.bpe_vocab_size", "Set data.bpe_vocab_size=272, or model.config.vocab_size=4096"),
    (
        {"data.tokenizer": "bpe", "model.config": {"model_type": "llama", "vocab_size": 100}},
        "data.bpe_vocab_size",
        "Set data.tokenizer=bytes, or model.config.vocab_size=4096",
    ),
    ({"data.source": "text"}, "data.path", "Set data.path to a file, glob or folder."),
    ({"data.source": "hf"}, "data.path", "hub id"),
    ({"data.source": "python_stdlib", "data.path": "x"}, "data.path", "Use data=text or data=hf, or leave it out."),
    ({"data.source": "python_stdlib", "data.validation_path": "x"}, "data.validation_path", "reads no files of yours"),
    ({"data.source": "synthetic", "data.path": "x"}, "data.path", "reads no files of yours"),
    ({"data.source": "synthetic", "data.validation_path": "x"}, "data.validation_path", "reads no files of yours"),
    ({"data.streaming": True}, "data.streaming", "Use data=hf"),
    ({"stop.at_step": 2000}, "stop.at_step", "ends before, at train.max_steps=1000"),
    # deepspeed_extra against other keys
    (
        {"deepspeed_extra": {"data_types": {"grad_accum_dtype": "fp64"}}},
        "deepspeed_extra.data_types.grad_accum_dtype",
        "Give bf16, fp16 or fp32.",
    ),
    (
        {"deepspeed_extra": {"data_types": {"grad_accum_dtype": "fp32"}}},
        "deepspeed_extra.data_types.grad_accum_dtype",
        "another optimizer",
    ),
    (
        {"deepspeed_extra": {"data_types": {"grad_accum_dtype": "bf16"}}, "zero.stage": 0, "precision.dtype": "fp32"},
        "deepspeed_extra.data_types.grad_accum_dtype",
        "engine.py:2323",
    ),
    (
        {
            "deepspeed_extra": {"zero_optimization": {"offload_optimizer": {"super_offload": True}}},
            "offload.optimizer": "cpu",
            "zero.stage": 2,
        },
        "deepspeed_extra.zero_optimization.offload_optimizer.super_offload",
        "ignores it below stage 3",
    ),
]

ACCEPTED: list[dict[str, Any]] = [
    {},
    {"optimizer.lr": 0.0},
    {"zero.stage": 0, "precision.dtype": "fp32"},
    {"parallel.dp": 2, "launch.procs_per_node": 2},
    {"parallel.tp": 2, "launch.procs_per_node": 2},
    {"parallel.tp": 2, "launch.procs_per_node": 4, "zero.stage": 3, "parallel.order": ["dp", "tp", "sp", "pp"]},
    {"parallel.tp": 4, "launch.procs_per_node": "auto"},
    {"launch.procs_per_node": "auto", "train.global_batch_size": 30},  # ranks not known yet
    {"train.global_batch_size": 30, "train.micro_batch_size": 5, "launch.procs_per_node": 3},
    {"precision.dtype": "fp16", "precision.min_scale": 64.0, "precision.initial_scale_power": 6},
    {"precision.min_scale": 0.5},  # only fp16 reads it
    {"model.attention": "flash_attention_2"},
    {"offload.optimizer": "cpu"},
    {"offload.optimizer": "cpu", "offload.param": "cpu", "zero.stage": 3},
    {"zero.hpz_partition_size": 2, "zero.stage": 3, "launch.procs_per_node": 4},
    {"schedule.warmup_steps": 1000},
    {"checkpoint.best_metric": "loss"},
    {"checkpoint.ram_every_steps": 1},
    {"schedule.warmup_steps": 0.5},
    {"schedule.name": "wsd", "schedule.decay_steps": 0.5, "schedule.warmup_steps": 500},
    {"schedule.decay_steps": 2000},  # only wsd reads it
    {"optimizer.name": "sgd", "optimizer.betas": []},
    {"model.init": "pretrained", "model.path": "org/name", "model.config": {}},
    {"model.path": "org/name", "data.sequence_length": 4096},  # the model's positions are not known here
    {"data.sequence_length": 2048},
    {"data.tokenizer": "bpe", "data.bpe_vocab_size": 272},
    {"data.tokenizer": "org/name"},
    {"data.source": "text", "data.path": "x"},
    {"data.source": "text", "data.path": "x", "data.validation_path": "y"},
    {"data.source": "hf", "data.path": "x", "data.streaming": True},
    {"callbacks": {"profiler": {}, "curves": None}},
    {"run.name": "llama-1.5_b@2026+x=1"},
    {"stop.at_step": 1000},
    {"deepspeed_extra": {"data_types": {"grad_accum_dtype": "fp32"}}, "zero.stage": 2},
    {"deepspeed_extra": {"data_types": {"grad_accum_dtype": "fp32"}}, "offload.optimizer": "cpu"},
    {"deepspeed_extra": {"data_types": {"grad_accum_dtype": "bf16"}}},
]


@pytest.mark.parametrize(("changes", "key", "said"), REFUSED, ids=lambda value: str(value)[:60])
def test_refused(changes: dict[str, Any], key: str, said: str) -> None:
    problems = {problem.key: problem for problem in check(make_config(changes))}
    assert key in problems, problems
    assert said in str(problems[key])


@pytest.mark.parametrize("changes", ACCEPTED, ids=lambda value: str(value)[:60])
def test_accepted(changes: dict[str, Any]) -> None:
    assert check(make_config(changes)) == []


def test_every_rule_is_tried() -> None:
    in_range = [(make_config(changes), key) for changes, key, _ in REFUSED if not list(rules._bounds(make_config(changes)))]
    for rule in rules.RULES:
        assert any(problem.key == key for config, key in in_range for problem in rule(config)), rule


def test_problems_of_all_groups_come_together() -> None:
    config = make_config({"zero.stage": 0, "checkpoint.keep": -1, "optimizer.lr": -1.0, "data.source": "text"})
    with pytest.raises(ConfigError) as caught:
        require(config)
    assert [problem.key for problem in caught.value.problems] == ["optimizer.lr", "checkpoint.keep", "zero.stage", "data.path"]
    assert str(caught.value).startswith("4 problems:")


def test_require_accepts_what_has_no_problem() -> None:
    require(make_config())


def test_require_names_the_file_that_set_the_key() -> None:
    sources = {"zero.stage": "configs/zero/z0.yaml", "optimizer.lr": "override optimizer.lr=-1"}
    with pytest.raises(ConfigError) as caught:
        require(make_config({"zero.stage": 0, "optimizer.lr": -1.0}), lambda: sources)
    assert "(Set in configs/zero/z0.yaml.)" in str(caught.value)
    assert "(Set in override" not in str(caught.value)


def test_every_problem_has_reason_and_fix() -> None:
    for changes, _, _ in REFUSED:
        for problem in check(make_config(changes)):
            assert problem.reason.endswith((".", ";")), problem
            assert problem.fix.endswith("."), problem


def test_dimensions_of_a_model_that_is_known_later() -> None:
    config = make_config({"model.path": "org/name", "data.sequence_length": 4096})
    assert [problem.key for problem in check_dimensions(config, max_positions=1024, vocab_size=100)] == [
        "data.sequence_length",
        "data.tokenizer",
    ]
    assert list(check_dimensions(config, max_positions=None, vocab_size=None)) == []


def test_the_schema_alone_lacks_only_a_model() -> None:
    assert [problem.key for problem in check(Config())] == ["model.path"]
