"""The loop's side of checkpoints, over a live engine of one rank."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from helpers.checkpoint_engines import Layout, engine_of, manager, train
from helpers.ranks import run_ranks

pytestmark = pytest.mark.dist


def saves_of(engine: Any, directory: str, warnings: list[str], *, background: bool, **options: Any) -> Any:
    from anyshard.trainer.saves import Saves

    made = manager(Path(directory), keep=0, **options)
    saves = Saves(
        made, engine, background=background, meta=lambda progress, state: {"of": state}, warn=warnings.append, restored=None
    )
    saves.events = made.events  # type: ignore[attr-defined]
    return saves


def full(*args: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def names_in(directory: str) -> list[str]:
    return sorted(path.name for path in Path(directory).glob("step-*"))


def save_in(directory: str, background: bool) -> dict[str, Any]:
    from anyshard.trainer.state import Progress

    warnings: list[str] = []
    with engine_of(Layout(1, 1)) as engine:
        saves = saves_of(engine, directory, warnings, background=background)
        at_begin = []
        for step in (1, 2, 3):
            train(engine, step, 1)
            saves.after_step(will_save=True)
            with mock.patch.object(os, "posix_fallocate", full if step == 2 else os.posix_fallocate):
                saves.begin(Progress(step=step), {"number": step})
                at_begin.append(str(saves.last_good))
                saves.drain()
        between, inside = saves.take_stall_s()
        return {
            "warnings": warnings,
            "failed": saves.num_failed,
            "last_good": saves.last_good.name,
            "at_begin": at_begin,
            "stall": [between, inside, *saves.take_stall_s()],
            "names": names_in(directory),
        }


@pytest.mark.parametrize("background", [True, False])
def test_a_failed_save_is_told_and_counted(tmp_path: Path, background: bool) -> None:
    (found,) = run_ranks(save_in, 1, directory=str(tmp_path), background=background)
    assert found["names"] == ["step-00000001", "step-00000003"]
    (warning,) = found["warnings"]
    assert warning.startswith("step 2 was not saved: ")
    assert warning.endswith("Training goes on.")
    assert found["failed"] == 1
    assert found["last_good"] == "step-00000003"
    if not background:
        assert [name.rpartition("/")[2] for name in found["at_begin"]] == ["step-00000001", "step-00000001", "step-00000003"]
    assert found["stall"][0] > 0
    assert found["stall"][2:] == [0, 0], "each second is told once"


def finish(directory: str, last: str) -> dict[str, Any]:
    """The end of a run whose last step was saved ("saved"), was not ("not yet"), or whose save failed ("failed")."""
    from anyshard.configs.errors import CheckpointError
    from anyshard.trainer.state import Progress

    warnings: list[str] = []
    with engine_of(Layout(1, 1)) as engine:
        saves = saves_of(engine, directory, warnings, background=True)
        train(engine, 1, 1)
        with mock.patch.object(os, "posix_fallocate", full if last == "failed" else os.posix_fallocate):
            saves.begin(Progress(step=1), {})
            saves.drain()
        if last == "not yet":
            train(engine, 2, 1)
        begun = sum(kind == "save_begin" for kind, _ in saves.events)
        error = None
        with mock.patch.object(os, "posix_fallocate", full if last == "no room" else os.posix_fallocate):
            try:
                saves.finish(Progress(step=2 if last in ("not yet", "no room") else 1), {})
            except CheckpointError as caught:
                error = str(caught)
        return {
            "more": sum(kind == "save_begin" for kind, _ in saves.events) - begun,
            "names": names_in(directory),
            "last_good": saves.last_good and saves.last_good.name,
            "error": error,
        }


@pytest.mark.parametrize(
    ("last", "more", "names"),
    [
        ("saved", 0, ["step-00000001"]),
        ("not yet", 1, ["step-00000001", "step-00000002"]),
        ("failed", 1, ["step-00000001"]),
        ("no room", 1, ["step-00000001"]),
    ],
)
def test_the_end_of_a_run_is_durable(tmp_path: Path, last: str, more: int, names: list[str]) -> None:
    (found,) = run_ranks(finish, 1, directory=str(tmp_path), last=last)
    assert found["more"] == more
    assert found["names"] == names
    assert found["last_good"] == names[-1]
    assert (found["error"] is None) == (last != "no room")


def drain_for_a_while(directory: str) -> dict[str, Any]:
    from anyshard.trainer.state import Progress

    with engine_of(Layout(1, 1)) as engine:
        saves = saves_of(engine, directory, [], background=True)
        train(engine, 1, 1)
        real = os.fsync

        def slow(descriptor: int) -> None:
            time.sleep(1.0)
            real(descriptor)

        with mock.patch.object(os, "fsync", slow):
            saves.begin(Progress(step=1), {})
            started = time.monotonic()
            saves.drain(0.2)
            waited, unfinished = time.monotonic() - started, len(saves._pending)
            saves.drain()
        return {"waited": waited, "unfinished": unfinished, "names": names_in(directory)}


def test_a_rank_that_fails_waits_for_so_long_and_no_longer(tmp_path: Path) -> None:
    (found,) = run_ranks(drain_for_a_while, 1, directory=str(tmp_path))
    assert found["waited"] < 0.9
    assert found["unfinished"] == 1
    assert found["names"] == ["step-00000001"]
