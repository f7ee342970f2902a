"""Power failures at any moment of a run of saves: whatever the disk kept, the last checkpoint that was reported is found."""

from __future__ import annotations

import hashlib
import random
import shutil
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import a_commit, fragments_of
from helpers.power_loss import Disk, Op, Recorder

from anyshard.trainer.checkpoint.catalog import list_checkpoints, read_commit, verify
from anyshard.trainer.checkpoint.exchange import Exchange
from anyshard.trainer.checkpoint.faults import Faults
from anyshard.trainer.checkpoint.protocol import Protocol
from anyshard.trainer.checkpoint.retention import Retention, collect
from anyshard.trainer.checkpoint.store_files import FileStore
from anyshard.trainer.checkpoint.writer import write_rank

NUM_STATES = 10_000


def record(root: Path) -> list[Op]:
    """Saves of steps 1, 2 and 3 with `keep=2`, and of step 3 again."""
    root.mkdir()
    recorder = Recorder(root)
    protocol = Protocol(FileStore(root / "run" / "checkpoints"), Retention(2), Exchange(None, 1.0), Faults("", 0))
    with recorder.recording():
        for number, step in enumerate((1, 2, 3, 3)):
            values = {("w", "param"): torch.full((1500,), float(number)), ("b", "buffer"): torch.arange(3) + number}
            recorder.mark("begun", step, number)
            protocol.save(
                step,
                lambda directory, values=values: write_rank(directory, 0, fragments_of(values), [], {}, chunk_bytes=4096),
                lambda step=step, number=number: a_commit(step=step, meta={"number": number}),
                lambda num_bytes: None,
            )
            recorder.mark("saved", step, number)
    return recorder.ops


def problem_after(state: dict[str, bytes | None], directory: Path, begun: int, saved: int) -> str | None:
    """What is wrong with the state that a power failure left, after the clean-up of the next start."""
    for name, content in state.items():
        if content is None:
            (directory / name).mkdir(parents=True)
        else:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(content)
    checkpoints = directory / "run" / "checkpoints"
    collect(checkpoints)
    numbers = []
    for found in list_checkpoints(checkpoints):
        damages = [found.problem] if found.problem else [str(damage) for damage in verify(found.path)]
        if damages:
            return f"{found.path.name} looks like a checkpoint: {damages[0]}"
        numbers.append(read_commit(found.path).meta["number"])
    newest = max(numbers, default=-1)
    return None if saved <= newest <= begun else f"checkpoint {newest} was found after {saved} was reported"


def search(ops: list[Op], directory: Path, num_states: int) -> tuple[int, list[str]]:
    """Sample crashes at every point of the sequence; returns the number of different states, and what was wrong."""
    rng, disk, begun, saved = random.Random(0), Disk(), -1, -1
    seen: set[str] = set()
    problems = []
    per_point = -(-num_states // len(ops))
    for op in ops:
        if op[0] == "mark":
            begun, saved = (op[3], saved) if op[1] == "begun" else (begun, op[3])
        else:
            disk.apply(op)
        for _ in range(per_point):
            state = disk.after_power_loss(rng)
            key = hashlib.blake2b(repr((begun, saved, sorted(state.items(), key=lambda item: item[0]))).encode()).hexdigest()
            if key in seen:
                continue
            seen.add(key)
            here = directory / str(len(seen))
            here.mkdir()
            found = problem_after(state, here, begun, saved)
            if found is not None:
                problems.append(found)
            shutil.rmtree(here)
    return len(seen), problems


@pytest.fixture
def fast(tmp_path: Path) -> Path:
    """A folder in memory, where there is one."""
    memory = Path("/dev/shm")
    if not memory.is_dir():
        return tmp_path
    folder = memory / f"anyshard-{tmp_path.parent.name}-{tmp_path.name}"
    folder.mkdir()
    return folder


def test_every_state_that_a_power_failure_may_leave_has_the_last_good_checkpoint(tmp_path: Path, fast: Path) -> None:
    try:
        ops = record(tmp_path / "disk")
        kinds = {op[0] for op in ops}
        assert kinds == {"mark", "file", "directory", "write", "size", "sync", "rename", "remove"}
        different, problems = search(ops, fast, NUM_STATES)
    finally:
        shutil.rmtree(fast)
    assert problems == []
    assert different > NUM_STATES / 20


def test_the_model_sees_a_protocol_that_does_not_sync(tmp_path: Path, fast: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same saves without one kind of sync each: a model that finds nothing would prove nothing."""
    try:
        ops = record(tmp_path / "disk")
        directories = {0} | {op[3] for op in ops if op[0] == "directory"}
        for name, kept in (
            ("no file is synced", lambda number: number in directories),
            ("no directory is synced", lambda number: number not in directories),
        ):
            weaker = [op for op in ops if op[0] != "sync" or kept(op[1])]
            assert search(weaker, fast, 2000)[1], name
    finally:
        shutil.rmtree(fast)
