"""Crashes at random times of a run that saves at every step: a rank is killed, or stalls, whenever the clock says.

What must hold whatever happens: the newest checkpoint that verifies is of the last save that was begun or of the one before, it
holds the state of its step to the bit, and what is damaged is passed over by name. A few cases run on every day, other ones on
the next (`helpers/sampling.py`); `slow` runs many.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.checkpoint_engines import Layout, engine_of, logical_state, manager, scrambled_llama, train
from helpers.ranks import RanksError, run_ranks
from helpers.sampling import seed

pytestmark = pytest.mark.dist

LAYOUTS = [Layout(2, 0), Layout(2, 1), Layout(2, 2, offload=True), Layout(2, 3, sub_group=1500)]
TARGETS = [Layout(1, 1), Layout(2, 2), Layout(2, 3)]
LONGEST_S = 1.5
"""The kill comes at most so long after the first step; a step and its save take some hundredths of a second."""


def train_until_killed(layout: Layout, directory: str, notes: str, victim: int, after_s: float) -> None:
    """A save after every step, for ever; one rank dies `after_s` into it."""
    import torch.distributed as dist

    from anyshard.configs.errors import CheckpointError

    rank = dist.get_rank()
    with engine_of(layout) as engine:
        made = manager(Path(directory), keep=0, timeout_s=20.0)
        train(engine, 0, 1)
        dist.barrier()
        if rank == victim:
            threading.Timer(after_s, os.kill, [os.getpid(), signal.SIGKILL]).start()
        try:
            for step in range(1, 10_000):
                train(engine, step, 1)
                state = logical_state(engine)
                made.drain()
                if rank == 0:
                    _note(Path(notes), step, state)
                made.begin(engine, step=step, meta={"step": step}, rank_meta={})
        except (RuntimeError, CheckpointError) as error:
            made.drain(20)
            raise ValueError("the survivor saw it") from error


def _note(notes: Path, step: int, state: dict[str, str]) -> None:
    """What the save that begins now must hold; rank 0 itself may be killed at any time, also while it notes."""
    temporary = notes / f"{step}.part"
    temporary.write_text(json.dumps(state))
    temporary.rename(notes / f"{step}.json")


def resume(layout: Layout, directory: str) -> dict[str, Any]:
    with engine_of(layout, scrambled_llama()) as engine:
        made = manager(Path(directory))
        path = made.find("auto")
        found = {"step": made.restore(engine, path).meta["step"], "state": logical_state(engine)} if path else {"step": 0}
        return {**found, "events": made.events, "left": sorted(each.name for each in Path(directory).glob("*"))}


def one_crash(folder: Path, number: int) -> None:
    draw = random.Random(f"{seed()} crash {number}")
    layout, target, victim = draw.choice(LAYOUTS), draw.choice(TARGETS), draw.randrange(2)
    after_s = draw.uniform(0, LONGEST_S)
    checkpoints, notes = folder / "checkpoints", folder / "notes"
    notes.mkdir(parents=True)
    case = f"{layout}, rank {victim} killed after {after_s:.4f} s"
    arguments = {"layout": layout, "directory": str(checkpoints), "notes": str(notes)}
    with pytest.raises(RanksError) as caught:
        run_ranks(train_until_killed, 2, **arguments, victim=victim, after_s=after_s, fresh=True, timeout_s=90)
    assert f"rank {victim}: the process died with exit code -9" in str(caught.value), case
    assert "the survivor saw it" in str(caught.value), f"{case}: {caught.value}"
    begun = max((int(path.stem) for path in notes.glob("*.json")), default=0)
    after = run_ranks(resume, target.dp, layout=target, directory=str(checkpoints), timeout_s=60)[0]
    assert after["step"] in (begun, begun - 1) or after["step"] == begun == 0, case
    assert after["events"] == [], case
    assert not any(".tmp-" in name for name in after["left"]), case
    if after["step"] == 0:
        return
    assert after["state"] == json.loads((notes / f"{after['step']}.json").read_text()), case
    damage_and_resume(checkpoints, notes, target, after["step"], draw)


def damage_and_resume(checkpoints: Path, notes: Path, target: Layout, step: int, draw: random.Random) -> None:
    """Any bit of any file of the newest flips: the one before is taken, and the file is named."""
    path = draw.choice(sorted((checkpoints / f"step-{step:08d}").iterdir()))
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    if step == 1:
        with pytest.raises(RanksError, match="None of the 1 checkpoints") as caught:
            run_ranks(resume, target.dp, layout=target, directory=str(checkpoints), timeout_s=60)
        assert path.name in str(caught.value)
        return
    after = run_ranks(resume, target.dp, layout=target, directory=str(checkpoints), timeout_s=60)[0]
    assert after["step"] == step - 1
    assert after["state"] == json.loads((notes / f"{step - 1}.json").read_text())
    ((kind, details),) = after["events"]
    assert kind == "checkpoint_damaged"
    assert path.name in details["damages"][0]


@pytest.mark.parametrize("number", range(2))
def test_a_crash_at_a_random_time(tmp_path: Path, number: int) -> None:
    one_crash(tmp_path, number)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_crashes_at_random_times(tmp_path: Path) -> None:
    for number in range(2, 42):
        one_crash(tmp_path / str(number), number)


# ---- a rank that stalls

STALL_S = 4.0
TIMEOUT_S = 1.5


def train_with_a_stall(layout: Layout, directory: str, victim: int, at_step: int, after_s: float) -> dict[str, Any]:
    """One rank stands still as a whole, from a random moment of a step and its save on, for longer than the commit waits."""
    import torch.distributed as dist

    from anyshard.configs.errors import CheckpointError

    states, failed = {}, {}
    with engine_of(layout) as engine:
        made = manager(Path(directory), keep=0, timeout_s=TIMEOUT_S)
        for step in range(1, 9):
            if (dist.get_rank(), step) == (victim, at_step):
                threading.Timer(after_s, _stand_still).start()
            train(engine, step, 1)
            states[step] = logical_state(engine)
            save = made.begin(engine, step=step, meta={"step": step}, rank_meta={})
            if step == at_step:
                time.sleep(STALL_S + 1)  # the stall is over
            made.drain()
            try:
                save.result()
            except CheckpointError as error:
                failed[step] = str(error)
        return {"states": states, "failed": failed}


def _stand_still() -> None:
    subprocess.Popen(["sh", "-c", f"sleep {STALL_S}; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)


def states_in(layout: Layout, directory: str) -> dict[int, dict[str, str]]:
    found = {}
    for path in sorted(Path(directory).glob("step-*")):
        with engine_of(layout, scrambled_llama()) as engine:
            step = manager(Path(directory)).restore(engine, path).meta["step"]
            found[step] = logical_state(engine)
    return found


def one_stall(folder: Path, number: int) -> None:
    draw = random.Random(f"{seed()} stall {number}")
    layout, victim, at_step = draw.choice(LAYOUTS), draw.randrange(2), draw.randrange(1, 6)
    after_s = draw.uniform(0, 0.1)
    case = f"{layout}, rank {victim} stands still from {after_s:.4f} s into step {at_step} on"
    arguments = {"layout": layout, "directory": str(folder), "victim": victim, "at_step": at_step, "after_s": after_s}
    ranks = run_ranks(train_with_a_stall, 2, **arguments, fresh=True, timeout_s=90)
    assert ranks[0]["states"] == ranks[1]["states"], case
    assert set(ranks[0]["failed"]) | set(ranks[1]["failed"]) <= {at_step}, f"{case}: the saves after the stall work"
    for message in (*ranks[0]["failed"].values(), *ranks[1]["failed"].values()):
        assert "did not come to the checkpoint within 1.5 s" in message, case
    (restored,) = run_ranks(states_in, 1, layout=Layout(1, 1), directory=str(folder), timeout_s=90)
    assert restored.keys() | {at_step} == set(range(1, 9)), case
    assert restored == {step: ranks[0]["states"][step] for step in restored}, case


def test_a_rank_stalls(tmp_path: Path) -> None:
    one_stall(tmp_path, 0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ranks_stall_at_many_times(tmp_path: Path) -> None:
    for number in range(1, 13):
        one_stall(tmp_path / str(number), number)
