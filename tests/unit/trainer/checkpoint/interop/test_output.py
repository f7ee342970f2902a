import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from anyshard.configs.errors import CheckpointError, ConfigError, DiskFullError, EnvError
from anyshard.trainer.checkpoint.interop.output import new_folder, reading, refuse_occupied
from anyshard.trainer.checkpoint.retention import LEASE, lease


def write(folder: Path, name: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("y")


def fail(folder: Path, error: BaseException) -> None:
    write(folder, "half")
    if isinstance(error, OSError):
        error.filename = str(folder / "half")
    raise error


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with new_folder(out) as folder:
        assert folder.parent == out.parent
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("x")
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["inner"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("x")
    assert (tmp_path / "out" / "file").read_text() == "x"


def test_what_is_there_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for name, reason in (("full", "not empty"), ("file", "file of this name"), ("link", "file of this name")):
        with pytest.raises(ConfigError, match=reason):
            refuse_occupied(tmp_path / name)
        with pytest.raises(ConfigError, match=reason), new_folder(tmp_path / name):
            pytest.fail("it began")
    with pytest.raises(ConfigError, match="not empty"), new_folder(tmp_path / "late"):
        write(tmp_path / "late", "theirs")
    assert (tmp_path / "late" / "theirs").read_text() == "y"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full", "late", "link"]


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), DiskFullError, 3),
        (OSError(errno.EACCES, "Permission denied"), EnvError, 3),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (CheckpointError("damaged"), CheckpointError, 1),
    ],
)
def test_after_an_error_nothing_is_left(tmp_path: Path, error: BaseException, kind: type, code: int | None) -> None:
    with pytest.raises(kind) as caught, new_folder(tmp_path / "out") as folder:
        fail(folder, error)
    assert list(tmp_path.iterdir()) == []
    if code is not None:
        assert caught.value.exit_code == code
    if isinstance(error, OSError):
        assert str(caught.value).startswith(f"{tmp_path}/out/half: ")


def test_a_parent_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(EnvError, match="file"), new_folder(tmp_path / "file" / "out"):
        pytest.fail("it began")


def test_what_a_killed_command_left_is_removed(tmp_path: Path) -> None:
    dead, living, other = (tmp_path / f"{name}.tmp-{digit * 32}" for name, digit in (("out", "0"), ("out", "1"), ("two", "2")))
    for path in (dead, living, other):
        path.mkdir()
        (path / LEASE).write_bytes(lease())
    for path in (dead, other):
        (path / LEASE).write_text(json.dumps({**json.loads(lease()), "boot": "an earlier one"}))
    with new_folder(tmp_path / "out"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"out", living.name, other.name}


def test_a_full_disk(tmp_path: Path) -> None:
    """A real one, where this machine lets us mount."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or os.system(f"mount -t tmpfs -o size=64k tmpfs {disk} 2>/dev/null"):
        pytest.skip("no tmpfs can be mounted here")
    try:
        with pytest.raises(DiskFullError, match="No space left"), new_folder(disk / "out") as folder:
            (folder / "big").write_bytes(bytes(2**20))
        assert list(disk.iterdir()) == []
    finally:
        os.system(f"umount {disk}")
        shutil.rmtree(disk, ignore_errors=True)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"rank-00000\.bin: cannot be read \(No such file"), reading(tmp_path):
        (tmp_path / "rank-00000.bin").read_bytes()
