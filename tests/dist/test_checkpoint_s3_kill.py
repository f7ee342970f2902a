"""SIGKILL of a rank during a save to an object store: the last good checkpoint is found, half a one is never seen."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.checkpoint_engines import Layout, engine_of, logical_state, manager, scrambled_llama, train
from helpers.ranks import RanksError, run_ranks
from helpers.s3 import BUCKET, s3_server

from anyshard.configs.places import place
from anyshard.trainer.checkpoint import catalog
from anyshard.trainer.checkpoint.faults import VARIABLE

pytestmark = pytest.mark.dist

TIMES = {"data": 5}
"""At which passing of the point the rank is killed, in the third save; rank 0 writes two blocks in each."""


@pytest.fixture(scope="module")
def server() -> Iterator[dict[str, str]]:
    with s3_server() as variables:
        yield variables


def train_until_the_fault(directory: str, states: str, variables: dict[str, str], fault: str) -> None:
    """A save after every step; that of step 3 is fatal for one rank."""
    import torch.distributed as dist

    from anyshard.configs.errors import CheckpointError

    os.environ.update({**variables, VARIABLE: fault})
    with engine_of(Layout(2, 1)) as engine:
        made = manager(directory, keep=0, timeout_s=20.0)
        try:
            for step in range(1, 5):
                train(engine, step, 1)
                state = logical_state(engine)
                if dist.get_rank() == 0:
                    Path(states, f"{step}.json").write_text(json.dumps(state))
                made.drain()
                save = made.begin(engine, step=step, meta={"step": step}, rank_meta={})
            save.result()
        except (RuntimeError, CheckpointError):
            made.drain(25)
            raise


def resume(directory: str, variables: dict[str, str]) -> dict[str, Any]:
    os.environ.update(variables)
    with engine_of(Layout(1, 1), scrambled_llama()) as engine:
        made = manager(directory)
        restored = made.restore(engine, made.find("must"))
        state = logical_state(engine)
        train(engine, 7, 1)
        made.save(engine, step=7, meta={"step": 7}, rank_meta={})
        return {"step": restored.meta["step"], "state": state}


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("point", "rank"),
    [("temporary", 0), ("data", 0), ("data", 1), ("persisted", 1), ("gathered", 0), ("committed", 0), ("renamed", 0)],
)
def test_the_last_good_checkpoint_is_found(tmp_path: Path, server: dict[str, str], point: str, rank: int) -> None:
    directory = f"s3://{BUCKET}/{point}-{rank}/checkpoints"
    times = TIMES.get(point, 3) if rank == 0 else 3
    arguments = {"directory": directory, "states": str(tmp_path), "variables": server, "fault": f"{point}:{rank}:{times}"}
    with pytest.raises(RanksError) as caught:
        run_ranks(train_until_the_fault, 2, fresh=True, timeout_s=240, **arguments)
    assert f"rank {rank}: the process died with exit code -9" in str(caught.value)
    expected = {"renamed": {3}}.get(point, {2})
    found = catalog.list_checkpoints(place(directory))
    assert all(each.problem is None for each in found), "half a checkpoint is not one"
    assert {each.step for each in found} == {1, 2} | expected
    (after,) = run_ranks(resume, 1, directory=directory, variables=server, fresh=True, timeout_s=240)
    assert after["step"] in expected
    assert after["state"] == json.loads((tmp_path / f"{after['step']}.json").read_text())
    folders = {each.name for each in place(directory).iterdir()}
    kept = {catalog.checkpoint_name(each.step) for each in catalog.list_checkpoints(place(directory))}
    assert folders == {*kept, "latest"}, "what the dead writer left is collected"
