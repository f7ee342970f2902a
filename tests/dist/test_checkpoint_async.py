"""Saves in the background: they hold exactly the state of their step, and training does not notice them."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from helpers.checkpoint_engines import Layout, engine_of, logical_state, manager, scrambled_llama, train
from helpers.fitting import TINY, records
from helpers.fitting import train as fit
from helpers.ranks import run_ranks

pytestmark = pytest.mark.dist

STEPS = 5
LAYOUTS = [
    Layout(1, 0),
    Layout(2, 0),
    Layout(2, 1),
    Layout(2, 2, offload=True),
    Layout(2, 3, sub_group=1500),
    Layout(2, 3, offload=True, offload_param=True),
    Layout(2, 1, dtype="bf16"),
    Layout(2, 1, dtype="bf16", fp32_accumulation=True),
    Layout(2, 3, dtype="bf16", offload=True),
    Layout(2, 0, optimizer="lion"),
    Layout(2, 2, optimizer="sgd", offload=True),
]


def slow_copy(seconds: float) -> Any:
    """Every piece takes so long to copy: without a guard the next optimizer step would overtake it."""
    real = ctypes.memmove

    def slow(*args: Any) -> Any:
        time.sleep(seconds)
        return real(*args)

    return mock.patch.object(ctypes, "memmove", slow)


def save_every_step(layout: Layout, directory: str, staging_bytes: int | None) -> dict[str, Any]:
    with engine_of(layout) as engine:
        made, states, losses = manager(Path(directory), keep=0, staging_bytes=staging_bytes), {}, []
        with slow_copy(0.002):
            for step in range(1, STEPS + 1):
                losses += train(engine, step, 1)
                states[step] = logical_state(engine)
                made.begin(engine, step=step, meta={"step": step}, rank_meta={})
            made.drain()
        return {"states": states, "losses": losses, "stall_s": made.take_guard_stall_s(), "events": made.events}


def train_only(layout: Layout) -> dict[str, Any]:
    with engine_of(layout) as engine:
        losses = [loss for step in range(1, STEPS + 1) for loss in train(engine, step, 1)]
        return {"state": logical_state(engine), "losses": losses}


def states_in(layout: Layout, directory: str) -> dict[int, dict[str, str]]:
    """What a fresh engine holds after restoring each checkpoint."""
    found = {}
    for path in sorted(Path(directory).glob("step-*")):
        with engine_of(layout, scrambled_llama()) as engine:
            made = manager(Path(directory))
            assert made.restore(engine, path).meta["step"] == int(path.name[5:])
            found[int(path.name[5:])] = logical_state(engine)
    return found


@pytest.mark.sampled(4)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_save_at_every_step_is_of_that_step_and_changes_nothing(tmp_path: Path, layout: Layout) -> None:
    ranks = run_ranks(save_every_step, layout.dp, layout=layout, directory=str(tmp_path), staging_bytes=None)
    alone = run_ranks(train_only, layout.dp, layout=layout)[0]
    assert ranks[0]["losses"] == alone["losses"]
    assert ranks[0]["states"][STEPS] == alone["state"]
    assert all(rank["stall_s"] > 0 for rank in ranks), "copying was slow enough for steps to wait"
    target = Layout(1, 1, dtype=layout.dtype, optimizer=layout.optimizer)
    if layout.dtype == "bf16":
        target = layout
    restored = run_ranks(states_in, target.dp, layout=target, directory=str(tmp_path))[0]
    assert restored == ranks[0]["states"]
    commits = [details for kind, details in ranks[0]["events"] if kind == "commit"]
    assert [details["step"] for details in commits] == list(range(1, STEPS + 1))
    assert all(details["stall_ms"] > 0 for details in commits[:-1])


def save_with_little_memory(directory: str) -> dict[str, Any]:
    from anyshard.trainer.checkpoint import saving

    layout = Layout(2, 1)
    with (
        engine_of(layout) as engine,
        mock.patch.object(saving, "BLOCK_BYTES", 8192),
        mock.patch.object(saving, "max_blocks", return_value=2),
        mock.patch.object(saving, "CHUNK_BYTES", 4096),
    ):
        made, states = manager(Path(directory), keep=0), {}
        for step in range(1, STEPS + 1):
            train(engine, step, 1)
            states[step] = logical_state(engine)
            made.begin(engine, step=step, meta={"step": step}, rank_meta={})
        made.drain()
        return {"states": states, "held": made._saver._pool.num_bytes}


def test_with_less_memory_than_the_state_it_streams(tmp_path: Path) -> None:
    rank = run_ranks(save_with_little_memory, 2, directory=str(tmp_path))[0]
    assert rank["held"] == 2 * 8192
    assert min(path.stat().st_size for path in tmp_path.glob("*/*.bin")) > 4 * rank["held"]
    assert run_ranks(states_in, 1, layout=Layout(1, 1), directory=str(tmp_path))[0] == rank["states"]


# ---- failures


def fail_in_the_background(directory: str, call: str, code: int, rank: int) -> dict[str, Any]:
    """Step 1 is saved, the save of step 2 fails on one rank, steps 3 and 4 are saved; training goes on throughout."""
    import torch.distributed as dist

    from anyshard.configs.errors import CheckpointError

    layout = Layout(2, 2)
    with engine_of(layout) as engine:
        made, states, failures = manager(Path(directory), keep=0), {}, {}
        real = getattr(os, call)

        def failing(*args: Any, **kwargs: Any) -> Any:
            raise OSError(code, os.strerror(code))

        for step in range(1, 5):
            train(engine, step, 1)
            states[step] = logical_state(engine)
            with mock.patch.object(os, call, failing if (step, dist.get_rank()) == (2, rank) else real):
                save = made.begin(engine, step=step, meta={"step": step}, rank_meta={})
                if step == 2:
                    train(engine, 100, 1)  # while it fails
                    states[3] = None
                made.drain()
            try:
                save.result()
            except CheckpointError as error:
                failures[step] = str(error)
        return {"states": states, "failures": failures, "events": made.events}


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("call", "code", "rank"),
    [("posix_fallocate", errno.ENOSPC, 1), ("pwrite", errno.EIO, 0), ("fsync", errno.EIO, 1), ("mkdir", errno.EACCES, 0)],
)
def test_a_failed_save_is_known_everywhere_and_the_next_one_works(tmp_path: Path, call: str, code: int, rank: int) -> None:
    ranks = run_ranks(fail_in_the_background, 2, directory=str(tmp_path), call=call, code=code, rank=rank)
    assert ranks[0]["failures"] == ranks[1]["failures"]
    (message,) = ranks[0]["failures"].values()
    assert message.startswith("step 2 was not saved: rank")
    assert os.strerror(code) in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001", "step-00000003", "step-00000004"]
    assert ("save_failed", {"step": 2, "error": message}) in ranks[0]["events"]
    restored = run_ranks(states_in, 1, layout=Layout(1, 1), directory=str(tmp_path))[0]
    assert restored[4] == ranks[0]["states"][4]


def save_out_of_step(directory: str) -> list[str]:
    import torch.distributed as dist

    from anyshard.configs.errors import CheckpointError

    said = []
    with engine_of(Layout(2, 1)) as engine:
        made = manager(Path(directory))
        for step in (1 + dist.get_rank(), 3):
            try:
                made.save(engine, step=step, meta={}, rank_meta={})
            except CheckpointError as error:
                said.append(str(error))
    return said


def test_ranks_that_save_different_steps_are_told(tmp_path: Path) -> None:
    ranks = run_ranks(save_out_of_step, 2, directory=str(tmp_path))
    assert all("rank 1: this rank saves step-00000002 while rank 0 saves step-00000001" in said for (said,) in ranks)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000003"]


def queue_up(directory: str) -> dict[str, Any]:
    """Saves that are begun faster than the disk writes."""
    with engine_of(Layout(2, 1)) as engine:
        made, unfinished = manager(Path(directory), keep=0, bandwidth_mib_s=1), []
        for step in range(1, 6):
            train(engine, step, 1)
            made.begin(engine, step=step, meta={"step": step}, rank_meta={})
            unfinished.append(sum(not save.is_finished for save in made._saver._unfinished))
        made.drain()
        return {"unfinished": unfinished, "committed": [d["step"] for kind, d in made.events if kind == "commit"]}


def test_at_most_one_save_waits_for_another(tmp_path: Path) -> None:
    first, second = run_ranks(queue_up, 2, directory=str(tmp_path))
    assert max(first["unfinished"]) == 2
    assert max(second["unfinished"]) <= 2
    assert first["committed"] == [1, 2, 3, 4, 5]


# ---- whole runs

RUN = ["train.max_steps=8", "train.global_batch_size=8", "train.micro_batch_size=2", "train.activation_checkpointing=true"]
EVERY = ["checkpoint.every_steps=1", "checkpoint.at_end=true", "checkpoint.keep=0"]


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("zero", "offload"), [(0, "none"), (1, "cpu"), (3, "none")])
def test_a_run_with_background_saves_is_the_run_without(tmp_path: Path, zero: int, offload: str) -> None:
    """And its checkpoints are, byte for byte, those of a run that waits for each."""
    base = [*RUN, f"zero=z{zero}", f"offload={offload}"]
    plain = fit(tmp_path / "plain", base, 2)
    background = fit(tmp_path / "async", [*base, *EVERY, "checkpoint.mode=async"], 2)
    waiting = fit(tmp_path / "sync", [*base, *EVERY, "checkpoint.mode=sync"], 2)
    for name in ("train/loss", "train/grad_norm", "train/lr"):
        assert [r[name] for r in background] == [r[name] for r in plain] == [r[name] for r in waiting]
    steps = [f"step-{step:08d}" for step in range(1, 9)]
    for step in steps:
        for rank in range(2):
            here, there = (tmp_path / mode / "checkpoints" / step / f"rank-{rank:05d}.bin" for mode in ("async", "sync"))
            assert here.read_bytes() == there.read_bytes(), step
    events = [json.loads(line) for line in (tmp_path / "async" / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "commit"] == list(range(1, 9))
    assert [event["event"] for event in events][-2:] == ["commit", "done"]


def fit_on_a_full_disk(run_dir: str) -> None:
    from anyshard import compose, fit
    from anyshard.trainer.checkpoint import storage
    from anyshard.trainer.signals import Signals

    real = os.posix_fallocate

    def full(descriptor: int, offset: int, num_bytes: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if "step-00000002" in path or "step-00000004" in path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor, offset, num_bytes)

    options = ["train.max_steps=6", "checkpoint.every_steps=1", "checkpoint.at_end=true", f"run.dir={run_dir}"]
    with mock.patch.object(storage.os, "posix_fallocate", full):
        fit(compose([*TINY, *options]), signals=Signals())


def test_failed_saves_are_counted_and_training_goes_on(tmp_path: Path) -> None:
    run_ranks(fit_on_a_full_disk, 2, run_dir=str(tmp_path))
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "save_failed"] == [2, 4]
    assert [event["step"] for event in events if event["event"] == "commit"] == [1, 3, 5, 6]
    assert records(tmp_path)[-1]["step"] == 6
    assert records(tmp_path)[-1]["ckpt/failed"] >= 1


def come_late(directory: str, late: int) -> dict[str, Any]:
    """One rank is late for the commit of step 2, by more than the others wait; step 3 is saved as if nothing had been."""
    import torch.distributed as dist

    from anyshard.configs.errors import CheckpointError

    real, failures, states, naps = os.posix_fallocate, {}, {}, [4.0]

    def dawdle(*args: Any) -> None:
        time.sleep(naps.pop() if naps else 0)
        real(*args)

    with engine_of(Layout(2, 2)) as engine:
        made = manager(Path(directory), keep=0, timeout_s=2.0)
        for step in (1, 2, 3, 4):
            train(engine, step, 1)
            states[step] = logical_state(engine)
            slow = step == 2 and dist.get_rank() == late
            with mock.patch.object(os, "posix_fallocate", dawdle if slow else real):
                started = time.monotonic()
                save = made.begin(engine, step=step, meta={"step": step}, rank_meta={})
                made.drain()
            try:
                save.result()
            except CheckpointError as error:
                failures[step] = (str(error), time.monotonic() - started)
            dist.barrier()
        return {"failures": failures, "states": states, "agreed": made.agree(True)}


@pytest.mark.parametrize("late", [0, 1])
def test_saves_go_on_after_a_rank_came_late(tmp_path: Path, late: int) -> None:
    ranks = run_ranks(come_late, 2, directory=str(tmp_path), late=late, fresh=True)
    for rank in ranks:
        assert list(rank["failures"]) == [2]
        message, seconds = rank["failures"][2]
        assert "did not come to the checkpoint within 2 s" in message
        assert seconds < 12
        assert rank["agreed"]
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000001", "step-00000003", "step-00000004"]
    assert run_ranks(states_in, 1, layout=Layout(1, 1), directory=str(tmp_path))[0][4] == ranks[0]["states"][4]


def events_that_cannot_be_written(directory: str) -> list[str]:
    from anyshard.trainer.checkpoint.manager import CheckpointManager
    from anyshard.trainer.checkpoint.retention import Retention

    def full(kind: str, **details: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with engine_of(Layout(1, 1)) as engine:
        made = CheckpointManager(Path(directory), stay=Retention(0), verify=True, group=None, event=full)
        for step in (1, 2):
            train(engine, step, 1)
            save = made.begin(engine, step=step, meta={}, rank_meta={})
        made.drain()
        return [save.result().path.name]


def test_a_record_that_cannot_be_written_ends_no_save(tmp_path: Path) -> None:
    assert run_ranks(events_that_cannot_be_written, 1, directory=str(tmp_path)) == [["step-00000002"]]


def replace_states(directory: str) -> dict[int, dict[str, str]]:
    """Between saves the optimizer's states get other memory, the model another buffer."""
    states = {}
    with engine_of(Layout(1, 1)) as engine:
        made, inner = manager(Path(directory), keep=0), engine.optimizer.optimizer
        for step in (1, 2, 3):
            train(engine, step, 1)
            if step == 2:
                for state in inner.state.values():
                    state["exp_avg"] = state["exp_avg"].clone().mul_(2)
                engine.module.seen = engine.module.seen + 7
            states[step] = logical_state(engine)
            made.begin(engine, step=step, meta={"step": step}, rank_meta={}).result()
    return states


def test_a_state_that_was_replaced_is_found(tmp_path: Path) -> None:
    (states,) = run_ranks(replace_states, 1, directory=str(tmp_path))
    assert run_ranks(states_in, 1, layout=Layout(1, 1), directory=str(tmp_path)) == [states]
