"""A run whose last steps are in shared memory: after a crash it goes on from there, bit for bit."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from helpers.fitting import TINY, records, train
from helpers.ranks import RanksError, run_ranks

from anyshard.trainer.checkpoint import ram

pytestmark = pytest.mark.dist

RUN = ["train.max_steps=8", "train.global_batch_size=8", "train.micro_batch_size=2", "checkpoint.keep=0"]
EVERY = ["checkpoint.ram_every_steps=1", "checkpoint.every_steps=3", "checkpoint.at_end=true"]


def die_after(run_dir: str, overrides: list[str], step: int) -> None:
    """Rank 1 is killed once the save of `step` to memory is committed."""
    import torch.distributed as dist

    from anyshard import compose, fit
    from anyshard.trainer.saves import Saves
    from anyshard.trainer.signals import Signals

    real = Saves.begin_in_memory

    def begin(self: Saves, progress: Any, callback_state: dict[str, Any]) -> None:
        real(self, progress, callback_state)
        if progress.step == step:
            self.drain()
            if dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)

    Saves.begin_in_memory = begin  # type: ignore[method-assign]
    fit(compose([*TINY, f"run.dir={run_dir}", *overrides]), signals=Signals())


def crash(run: Path, step: int) -> None:
    with pytest.raises(RanksError):
        run_ranks(die_after, 2, run_dir=str(run), overrides=[*RUN, *EVERY], step=step, fresh=True)


def restores(run: Path) -> list[tuple[int, bool]]:
    """Step, and whether it was in memory."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [(e["step"], e["path"].startswith("/dev/shm/")) for e in events if e["event"] == "restore"]


def columns(run: Path) -> list[tuple[float, ...]]:
    return [tuple(r[name] for name in ("train/loss", "train/grad_norm", "train/lr", "tokens")) for r in records(run)]


def test_a_crash_loses_no_step_that_was_in_memory(tmp_path: Path) -> None:
    train(tmp_path / "whole", RUN, 2)
    run = tmp_path / "run"
    memory = ram.folder_of(run)
    try:
        crash(run, 5)
        assert [path.name for path in memory.glob("step-*")] == ["step-00000005"]
        assert ram.newest_step(run / "checkpoints") == 3
        train(run, [*RUN, *EVERY, "stop.at_step=6"], 2)
        assert restores(run) == [(5, True)]
        assert not memory.exists(), "the run ended in order: its state is on the disk"
        train(run, [*RUN, *EVERY], 2)
        assert restores(run) == [(5, True), (6, False)]
        assert columns(run)[-3:] == columns(tmp_path / "whole")[-3:]
    finally:
        ram.discard(memory)


def test_what_is_newer_on_the_disk_counts(tmp_path: Path) -> None:
    """And another layout takes the state in memory as it takes that on the disk; a run that goes back forgets it."""
    memory = ram.folder_of(tmp_path)
    try:
        crash(tmp_path, 4)
        newest = memory / "step-00000004"
        (newest / "COMMIT").write_bytes(b"?")
        train(tmp_path, [*RUN, *EVERY, "stop.at_step=5"], 1)
        assert restores(tmp_path) == [(3, False)], "what is in memory is damaged"
        crash(tmp_path, 7)
        train(tmp_path, [*RUN, *EVERY, "stop.at_step=8", "zero=z3"], 1)
        assert restores(tmp_path)[2:] == [(7, True)]
        crash_again = [*RUN, *EVERY, "train.max_steps=9", f"resume={tmp_path / 'checkpoints' / 'step-00000003'}"]
        ram.make(memory)
        (memory / "step-00000099").mkdir()
        train(tmp_path, crash_again, 1)
        assert restores(tmp_path)[3:] == [(3, False)]
        assert not memory.exists()
    finally:
        ram.discard(memory)


def test_a_loss_that_is_not_finite_is_not_kept(tmp_path: Path) -> None:
    overrides = [*RUN, *EVERY, "optimizer.lr=1e30", "train.max_grad_norm=0", "schedule=constant"]
    memory = ram.folder_of(tmp_path)
    try:
        with pytest.raises(RanksError, match="TrainError"):
            train(tmp_path, overrides, 2, fresh=True)
        assert not memory.exists()
    finally:
        ram.discard(memory)


def die_in_the_last_save(run_dir: str, overrides: list[str]) -> None:
    """Rank 1 is killed when its state shall become durable, as by a grace period that is over."""
    import torch.distributed as dist

    from anyshard import compose, fit
    from anyshard.trainer.checkpoint.manager import CheckpointManager
    from anyshard.trainer.signals import Signals

    def save(self: CheckpointManager, *args: Any, **kwargs: Any) -> Any:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, *args, **kwargs)

    real, CheckpointManager.save = CheckpointManager.save, save  # type: ignore[method-assign]
    fit(compose([*TINY, f"run.dir={run_dir}", *overrides]), signals=Signals())


def test_a_stop_puts_the_state_into_memory_before_it_is_saved(tmp_path: Path) -> None:
    memory = ram.folder_of(tmp_path)
    seldom = [*RUN, "checkpoint.ram_every_steps=100"]
    try:
        with pytest.raises(RanksError):
            run_ranks(die_in_the_last_save, 2, run_dir=str(tmp_path), overrides=[*seldom, "stop.at_step=4"], fresh=True)
        assert ram.newest_step(tmp_path / "checkpoints") == -1
        train(tmp_path, [*seldom, "stop.at_step=5"], 2)
        assert restores(tmp_path) == [(4, True)]
    finally:
        ram.discard(memory)
