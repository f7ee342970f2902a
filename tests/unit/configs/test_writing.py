"""Errors of folders that cannot be written, and whole files."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

from anyshard.configs.errors import EnvError
from anyshard.configs.writing import cannot_write, check_writable, write_file


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (errno.ENOSPC, "the disk is full. Free some space, or set checkpoint.dir to a folder on another disk."),
        (errno.EDQUOT, "the disk is full."),
        (errno.EEXIST, "a file is in the way of this folder. Move it, or set checkpoint.dir to another folder."),
        (errno.EACCES, "it cannot be written (Permission denied). Set checkpoint.dir to a folder that can."),
    ],
)
def test_what_is_wrong_and_what_to_do(code: int, said: str) -> None:
    error = cannot_write("checkpoint.dir", Path("/x"), OSError(code, os.strerror(code)))
    assert f"checkpoint.dir=/x: {said}" in str(error)
    assert error.exit_code == 3


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file(tmp_path / "a", "one")

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(EnvError, match=rf"run\.dir={tmp_path}: the disk is full"):
        write_file(tmp_path / "a", "two")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "one")]


def test_a_folder_is_looked_at_without_making_it(tmp_path: Path) -> None:
    check_writable("run.dir", tmp_path / "a" / "b")
    check_writable("run.dir", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_or_a_dangling_link_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for path in ("file", "file/sub", "link"):
        with pytest.raises(EnvError, match=rf"run\.dir={tmp_path}/{path}: a file is in the way"):
            check_writable("run.dir", tmp_path / path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(EnvError, match="Permission denied"):
        check_writable("run.dir", tmp_path / "run")


def test_a_file_system_that_is_read_only(tmp_path: Path) -> None:
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", tmp_path], check=False).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        with pytest.raises(EnvError, match=r"Read-only file system"):
            check_writable("run.dir", tmp_path / "run")
    finally:
        subprocess.run(["umount", tmp_path], check=True)
