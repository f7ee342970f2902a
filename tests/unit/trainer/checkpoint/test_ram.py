"""Checkpoints in shared memory, without ranks: whose the folder is, and what of it goes to the disk."""

import errno
import os
from pathlib import Path

import pytest
from helpers.checkpoints import some_values, write_checkpoint

from anyshard.configs.errors import EnvError
from anyshard.trainer.checkpoint import ram
from anyshard.trainer.checkpoint.catalog import verify


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(ram, "SHARED_MEMORY", tmp_path)
    return ram.folder_of(tmp_path / "run")


def test_a_run_has_one_folder_for_its_user_alone(tmp_path: Path, memory: Path) -> None:
    assert memory == ram.folder_of(tmp_path / "run" / "." / "checkpoints" / "..")
    assert memory != ram.folder_of(tmp_path / "other")
    ram.make(memory)
    ram.make(memory)
    assert memory.stat().st_mode & 0o777 == 0o700


def test_a_folder_of_someone_else_is_refused(tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    memory.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EnvError, match=r"is not a folder of this user\. Remove it"):
        ram.make(memory)
    memory.unlink()
    memory.mkdir()
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(EnvError, match=r"Set checkpoint\.ram_every_steps=0"):
        ram.make(memory)


def test_no_shared_memory_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ram, "SHARED_MEMORY", tmp_path / "none")
    with pytest.raises(EnvError, match="cannot be made"):
        ram.make(ram.folder_of(tmp_path))


def test_newest_step(tmp_path: Path) -> None:
    assert ram.newest_step(tmp_path / "none") == -1
    for name in ("step-00000003", "step-00000012", "step-00000040.tmp-" + "0" * 32):
        (tmp_path / name).mkdir()
    assert ram.newest_step(tmp_path) == 12


def test_the_newest_goes_to_the_disk(tmp_path: Path, memory: Path) -> None:
    disk = tmp_path / "run" / "checkpoints"
    write_checkpoint(disk, some_values(0), step=2)
    for step in (3, 4):
        source = write_checkpoint(memory, some_values(step), step=step)
    saved = ram.drain(memory, disk)
    assert saved == disk / "step-00000004"
    assert verify(saved) == []
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == {
        path.name: path.read_bytes() for path in source.iterdir()
    }
    assert sorted(path.name for path in disk.iterdir()) == ["step-00000002", "step-00000004"]
    assert ram.drain(memory, disk) is None, "once is enough"
    ram.discard(memory)
    assert not memory.exists()


def test_what_is_damaged_in_memory_is_passed_over(tmp_path: Path, memory: Path, caplog: pytest.LogCaptureFixture) -> None:
    disk = tmp_path / "checkpoints"
    write_checkpoint(memory, some_values(3), step=3)
    newest = write_checkpoint(memory, some_values(4), step=4)
    with (newest / "rank-00001.bin").open("r+b") as file:
        file.write(b"?")
    assert ram.drain(memory, disk) == disk / "step-00000003"
    assert "rank-00001.bin" in caplog.text


def test_an_older_state_stays_where_it_is(tmp_path: Path, memory: Path) -> None:
    write_checkpoint(tmp_path / "checkpoints", some_values(0), step=5)
    write_checkpoint(memory, some_values(1), step=4)
    assert ram.drain(memory, tmp_path / "checkpoints") is None
    assert ram.drain(tmp_path / "none", tmp_path / "checkpoints") is None


def test_a_full_disk_leaves_it_in_memory(tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_checkpoint(memory, some_values(1), step=4)

    def full(*args: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        ram.drain(memory, tmp_path / "checkpoints")
    assert list((tmp_path / "checkpoints").iterdir()) == []
    assert verify(source) == []
