"""SIGKILL of any rank at every point of a background save: the next start finds the last good checkpoint, whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from helpers.checkpoint_engines import Layout, engine_of, logical_state, manager, scrambled_llama, train
from helpers.ranks import RanksError, run_ranks

from anyshard.trainer.checkpoint.faults import POINTS, VARIABLE

pytestmark = pytest.mark.dist

FIRST_ONLY = ("committed", "renamed")
"""Points that rank 0 alone passes."""


def train_until_the_fault(directory: str, states: str, fault: str) -> None:
    """A save after every step; that of step 3 is fatal for one rank, while the others train on."""
    import torch.distributed as dist

    from anyshard.configs.errors import CheckpointError

    os.environ[VARIABLE] = fault
    with engine_of(Layout(2, 3, sub_group=1500)) as engine:
        made = manager(Path(directory), keep=0)
        try:
            for step in range(1, 6):
                train(engine, step, 1)
                state = logical_state(engine)
                if dist.get_rank() == 0:
                    Path(states, f"{step}.json").write_text(json.dumps(state))
                made.drain()
                save = made.begin(engine, step=step, meta={"step": step}, rank_meta={})
            save.result()
        except (RuntimeError, CheckpointError) as error:
            made.drain(20)
            raise ValueError(f"the survivor saw it: {save.is_finished}") from error


def resume(directory: str, layout: Layout) -> dict[str, Any]:
    with engine_of(layout, scrambled_llama()) as engine:
        made = manager(Path(directory))
        restored = made.restore(engine, made.find("must"))
        left = sorted(path.name for path in Path(directory).iterdir())
        return {"step": restored.meta["step"], "state": logical_state(engine), "left": left}


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    ("point", "rank"), [(point, rank) for point in POINTS for rank in range(1 if point in FIRST_ONLY else 2)]
)
def test_the_last_good_checkpoint_is_found(tmp_path: Path, point: str, rank: int) -> None:
    checkpoints, states = tmp_path / "checkpoints", tmp_path / "states"
    states.mkdir()
    times = 5 if (point, rank) == ("data", 0) else 3  # rank 0 writes a second block in each save: the buffers
    with pytest.raises(RanksError) as caught:
        run_ranks(
            train_until_the_fault,
            2,
            directory=str(checkpoints),
            states=str(states),
            fault=f"{point}:{rank}:{times}",
            fresh=True,
            timeout_s=90,
        )
    assert f"rank {rank}: the process died with exit code -9" in str(caught.value)
    assert "the survivor saw it: True" in str(caught.value), "its pending save has ended too: nothing hangs"
    # a peer that goes on alone may finish a save that all have agreed on
    expected = {"renamed": {3}, "gathered": {2, 3}}.get(point, {2})
    (after,) = run_ranks(resume, 1, directory=str(checkpoints), layout=Layout(1, 1), timeout_s=60)
    assert after["step"] in expected
    assert after["state"] == json.loads((states / f"{after['step']}.json").read_text())
    assert not any("tmp" in name for name in after["left"]), "the dead writer's directory is collected"
