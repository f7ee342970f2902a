import errno
import os
from pathlib import Path

import pytest

from anyshard.trainer.checkpoint.storage import is_disk_full, new_file, replace_durably, write_at, write_durably


def test_space_is_reserved_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left") as caught, new_file(tmp_path / "x", 1234):
        pytest.fail("the block must not be entered")
    assert caught.value.filename == str(tmp_path / "x")
    assert "(it needs 1,234 bytes, " in str(caught.value.strerror)
    assert is_disk_full(caught.value)


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_that_cannot_reserve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def cannot(*args: object) -> None:
        raise OSError(code, "no")

    monkeypatch.setattr(os, "posix_fallocate", cannot)
    write_durably(tmp_path / "x", b"abc")
    assert (tmp_path / "x").read_bytes() == b"abc"


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    write_durably(tmp_path / "x", b"abc")
    with pytest.raises(FileExistsError):
        write_durably(tmp_path / "x", b"def")


def test_short_writes_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:3], offset))
    with new_file(tmp_path / "x", 12) as descriptor:
        write_at(descriptor, memoryview(b"0123456789"), 2)
    assert (tmp_path / "x").read_bytes() == b"\0\x000123456789"


def test_replace_leaves_the_old_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_durably(tmp_path / "latest", b"old")

    def fail(*args: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", fail)
        with pytest.raises(OSError, match="Input/output"):
            replace_durably(tmp_path / "latest", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]
    assert (tmp_path / "latest").read_bytes() == b"old"
    replace_durably(tmp_path / "latest", b"new")
    assert (tmp_path / "latest").read_bytes() == b"new"
