"""A rank that is given other data than those that share its model ends the run with one error on all of them."""

from __future__ import annotations

import re
from typing import Any

import pytest
from helpers.fitting import TINY
from helpers.ranks import run_ranks

pytestmark = pytest.mark.dist


class _Other:
    """A data set whose samples differ on one rank, from one index on."""

    def __init__(self, inner: Any, wrong: bool) -> None:
        self._inner, self._wrong = inner, wrong

    def __len__(self) -> int:
        return len(self._inner)

    def __getitem__(self, index: int) -> Any:
        sample = {name: value.copy() for name, value in self._inner[index].items()}
        if self._wrong:
            sample["input_ids"][3] = (sample["input_ids"][3] + 1) % 256
        return sample


def _train(run_dir: str, wrong_rank: int | None, overrides: list[str]) -> str:
    """On a rank: train on a data set that is another on `wrong_rank`; returns how it ended."""
    import torch
    import torch.distributed as dist

    from anyshard import compose, fit
    from anyshard.configs.errors import TrainError
    from anyshard.trainer.data.build import build_data
    from anyshard.trainer.lm import build_lm_task
    from anyshard.trainer.models.hf import build
    from anyshard.trainer.stop import Signals

    base = ["train.max_steps=3", "train.global_batch_size=4", "train.micro_batch_size=2"]
    config = compose([*TINY, f"run.dir={run_dir}", *base, *overrides])

    def model() -> Any:
        return build(config, device=torch.device("cpu"), dtype=torch.float32)

    task = build_lm_task(config, build_data(config.data, seed=config.seed, say=lambda _: None), model)
    task.train_data = _Other(task.train_data, dist.get_rank() == wrong_rank)
    try:
        return f"done at {fit(config, task, signals=Signals()).step}"
    except TrainError as error:
        return str(error)


def test_another_sample_on_one_rank_ends_the_run_on_all(tmp_path: Any) -> None:
    told = run_ranks(_train, 4, run_dir=str(tmp_path / "a"), wrong_rank=3, overrides=["parallel.tp=2"])
    assert len(set(told)) == 1
    assert re.match(r"at step 1 the data loader gave some samples to rank 2 and others to rank 3, which share", told[0])


def test_equal_data_or_no_check_goes_on(tmp_path: Any) -> None:
    for name, wrong, more in (("same", None, []), ("off", 1, ["train.check_data_every_steps=0"])):
        overrides = ["parallel.tp=2", *more]
        assert run_ranks(_train, 2, run_dir=str(tmp_path / name), wrong_rank=wrong, overrides=overrides) == ["done at 3"] * 2


def _compare(sp: int) -> str:
    """On a rank of sp x dp: batches of which rank 1's is another."""
    import torch
    import torch.distributed as dist

    from anyshard.configs.errors import TrainError
    from anyshard.parallel.topology import Mesh
    from anyshard.trainer.data.agreement import require_same_data

    rank, mesh = dist.get_rank(), Mesh(dp=dist.get_world_size() // sp, sp=sp)
    batches = [{"input_ids": torch.full((2, 3), mesh.coordinates(rank)["dp"])}]
    require_same_data(batches, mesh, 1)
    if rank == 1:
        batches[0]["input_ids"][1, 2] += 1
    try:
        require_same_data(batches, mesh, 7)
    except TrainError as error:
        return str(error)
    return "nothing"


def test_ranks_that_share_sequences_too() -> None:
    for told in run_ranks(_compare, 4, sp=2):
        assert told.startswith("at step 7 the data loader gave some samples to rank 0 and others to rank 1, which share")
