"""Stages of a pipeline as they are built: pretrained weights, a model of the user's own, what peers see."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from helpers.fitting import TINY
from helpers.models import small_config
from helpers.ranks import run_ranks

pytestmark = pytest.mark.dist


def _pretrained(path: str, tp: int) -> tuple[float, int]:
    """On a rank: the largest difference of a loaded stage's parameters from those in the file, and how many it has."""
    import torch
    import torch.distributed as dist
    from safetensors.torch import load_file

    from anyshard.configs.schema import Init, Parallel
    from anyshard.parallel.groups import create_groups
    from anyshard.parallel.part import part_of
    from anyshard.parallel.topology import Mesh
    from anyshard.trainer.models.hf import build_stage

    config = small_config("qwen3", path=path, init=Init.pretrained, config={})
    config.parallel = Parallel(pp=2, tp=tp)
    groups = create_groups(Mesh(dp=dist.get_world_size() // 2 // tp, tp=tp, pp=2), dist.get_rank())
    stage = build_stage(config, device=torch.device("cpu"), dtype=torch.float32, groups=groups)
    stored = load_file(f"{path}/model.safetensors")
    worst, count = 0.0, 0
    for name, param in stage.named_parameters():
        part = part_of(param)
        whole = stored[name if part is None else part.name]
        region = ... if part is None else tuple(slice(*side) for side in part.box)
        worst, count = max(worst, float((param - whole[region]).abs().max())), count + 1
    return worst, count


def test_pretrained_weights_go_to_their_stage(tmp_path: Path) -> None:
    import torch

    from anyshard.trainer.models.hf import build

    whole = build(small_config("qwen3"), device=torch.device("cpu"), dtype=torch.float32)
    whole.save_pretrained(tmp_path)
    for tp in (1, 2):
        found = run_ranks(_pretrained, 2 * tp, path=str(tmp_path), tp=tp)
        assert {worst for worst, _ in found} == {0.0}
        counts = [count for _, count in found][::tp]
        assert sum(counts) == len(list(whole.parameters())) + 1  # the embedding of the tied head is on both


def _own_model(run_dir: str, pp: int) -> dict[str, Any]:
    """On a rank: train a task of one's own; the digests of the batches, and the evaluation."""
    import torch

    from anyshard import Task, compose, fit
    from anyshard.trainer.data.build import build_data
    from anyshard.trainer.lm import build_lm_task
    from anyshard.trainer.models.hf import build
    from anyshard.trainer.stop import Signals

    overrides = ["train.max_steps=2", "train.eval_samples=3", "zero=z1", f"parallel.pp={pp}", "checkpoint.at_end=true"]
    config = compose([*TINY, *overrides, f"run.dir={run_dir}"])
    splits = build_data(config.data, seed=config.seed, say=lambda text: None)
    task: Task = build_lm_task(config, splits, lambda: build(config, device=torch.device("cpu"), dtype=torch.float32))
    seen = []
    collate = task.collate

    def looked_at(samples: list[Any]) -> Any:
        batch = collate(samples)
        seen.append(hashlib.blake2b(batch["input_ids"].numpy().tobytes()).hexdigest())
        return batch

    task.collate = looked_at
    task.predict = lambda model, batch: {"largest": model(input_ids=batch["input_ids"]).logits.float().max()}
    outcome = fit(config, task, signals=Signals())
    return {"batches": seen[:4], "evaluation": outcome.evaluation, "loss": outcome.loss}


def test_a_task_of_the_users_own(tmp_path: Path) -> None:
    (alone,) = run_ranks(_own_model, 1, run_dir=str(tmp_path / "alone"), pp=1)
    stages = run_ranks(_own_model, 2, run_dir=str(tmp_path / "stages"), pp=2)
    assert stages[0] == stages[1]
    assert stages[0]["batches"] == alone["batches"]
    assert stages[0]["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert set(alone["evaluation"]) == {"loss", "perplexity", "largest"}
    assert stages[0]["evaluation"] == pytest.approx(alone["evaluation"], rel=1e-5)


def _measured(vocab_size: int) -> tuple[Any, tuple[int, ...]]:
    """On a rank: the measured costs of a model, and the stages that come of them."""
    import torch
    import torch.distributed as dist

    from anyshard.configs.schema import Balance, Parallel
    from anyshard.parallel.groups import create_groups
    from anyshard.parallel.stages import division_of
    from anyshard.parallel.topology import Mesh
    from anyshard.trainer.models.hf import build, build_stage
    from anyshard.trainer.models.stage_times import measure

    config = small_config("gpt2")
    config.model.config = config.model.config | {"vocab_size": vocab_size}
    config.parallel = Parallel(pp=2, pp_balance=Balance.time)
    config.train.micro_batch_size = 2
    cpu = torch.device("cpu")
    before = torch.get_rng_state()
    division = division_of("gpt2")
    assert division is not None
    costs = measure(
        lambda: build(config, device=torch.device("meta"), dtype=torch.float32),
        division,
        config,
        device=cpu,
        dtype=torch.float32,
    )
    assert torch.equal(torch.get_rng_state(), before), "the run draws other random numbers"
    groups = create_groups(Mesh(dp=1, pp=2), dist.get_rank())
    return costs, build_stage(config, device=cpu, dtype=torch.float32, groups=groups).stages.bounds


def test_stages_by_measured_time() -> None:
    """A head of 40,000 tokens takes longer than three layers of 64 features: it is alone with the layer that it must have."""
    first, second = run_ranks(_measured, 2, vocab_size=40_000)
    assert first == second
    costs, bounds = first
    assert len(costs.layers) == 3
    assert len(set(costs.layers)) == 1  # they are alike, and measured once
    assert min(costs.layers) > 0
    assert costs.last > sum(costs.layers)
    assert bounds == (0, 2, 3)
