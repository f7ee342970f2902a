"""What goes wrong with a drive while a run swaps to it: one clear error, no hang, and the last checkpoint stays."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers.cli import anyshard, finish, happened, rank_pids, start, wait_for
from helpers.swapping import on_drive

pytestmark = pytest.mark.e2e

RUN = ["debug=smoke", "train.log_every_steps=1", "train.eval_samples=0", "checkpoint.every_steps=2", "run.dir=run"]


@contextlib.contextmanager
def small_drive(folder: Path, mib: int):
    """A file system of its own, in memory."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("mounting takes root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def test_a_drive_that_is_too_small_is_told_before_the_first_step(tmp_path):
    with small_drive(tmp_path / "drive", 24) as drive:
        done = anyshard("train", *RUN, *on_drive("nvme", drive), cwd=tmp_path)
        assert done.returncode == 3, done.stdout + done.stderr
        assert "this rank's swap files take" in done.stderr
        assert not list((drive / "anyshard-swap").iterdir())
    assert not happened(tmp_path / "run", "save_begin")


def test_others_may_fill_the_drive_while_it_trains(tmp_path):
    with small_drive(tmp_path / "drive", 80) as drive:
        process = start("train", *RUN, *on_drive("nvme", drive), "train.max_steps=8", cwd=tmp_path)
        wait_for(lambda: happened(tmp_path / "run", "offload"), process, 300)
        with contextlib.suppress(OSError), (drive / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 2**20)
        full = shutil.disk_usage(drive).free
        code, _, errors = finish(process, 200)
        assert code == 0, errors
        assert full < 2**20
        assert not list((drive / "anyshard-swap").iterdir())


def test_a_drive_that_goes_away_ends_the_run_which_goes_on_elsewhere(tmp_path):
    process = start("train", *RUN, *on_drive("nvme", tmp_path / "drive"), "train.max_steps=4000", cwd=tmp_path)
    wait_for(lambda: happened(tmp_path / "run", "commit"), process, 300)
    shutil.rmtree(tmp_path / "drive")
    code, _, errors = finish(process, 200)
    assert code == 3, errors
    assert "is gone, with the swap files of this rank" in errors
    assert "anyshard resume" in errors
    done = anyshard("resume", "run", f"offload.nvme_path={tmp_path / 'other'}", "stop.at_s=1", cwd=tmp_path)
    assert "resumed from" in done.stdout, done.stderr


def test_what_a_killed_run_left_is_removed_by_the_next_start(tmp_path):
    drive = tmp_path / "drive"
    process = start("train", *RUN, *on_drive("nvme_param", drive), "train.max_steps=4000", cwd=tmp_path)
    wait_for(lambda: happened(tmp_path / "run", "commit"), process, 300)
    os.kill(rank_pids(process)[0], 9)
    assert finish(process, 100)[0] != 0
    (left,) = (drive / "anyshard-swap").iterdir()
    done = anyshard("resume", "run", "stop.at_s=1", cwd=tmp_path)
    assert "resumed from" in done.stdout, done.stderr
    assert not left.exists()
    assert not list((drive / "anyshard-swap").iterdir())
