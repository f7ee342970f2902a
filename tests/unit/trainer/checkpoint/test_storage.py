import errno
import os
from pathlib import Path

import pytest

from anyshard.trainer.checkpoint import storage
from anyshard.trainer.checkpoint.staging import Block
from anyshard.trainer.checkpoint.storage import (
    is_direct,
    is_disk_full,
    new_file,
    replace_durably,
    write_at,
    write_block,
    write_durably,
)


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


PAGE = 4096


def write_pattern(path: Path) -> bool:
    """Two blocks written directly where that works; returns whether the second was."""
    block = Block(2 * PAGE)
    block.data[:] = b"ab" * PAGE
    with new_file(path, 4 * PAGE, direct=True) as descriptor:
        write_block(descriptor, block.data, 0)
        write_block(descriptor, block.data, 2 * PAGE)
        direct = is_direct(descriptor)
    assert path.read_bytes() == b"ab" * 2 * PAGE
    return direct


def test_large_files_go_past_the_page_cache_or_not_and_hold_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pattern(tmp_path / "as the file system likes")
    real_open, real_write = os.open, os.pwrite

    def refuses_the_flag(path: object, flags: int, *args: object) -> int:
        if flags & os.O_DIRECT:
            os.close(real_open(path, flags & ~os.O_DIRECT, *args))  # type: ignore[arg-type]
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, *args)  # type: ignore[arg-type]

    def refuses_the_write(descriptor: int, data: memoryview, offset: int) -> int:
        if is_direct(descriptor):
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_write(descriptor, data, offset)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuses_the_flag)
        assert not write_pattern(tmp_path / "flag refused")
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", refuses_the_write)
        assert not write_pattern(tmp_path / "write refused")
    with monkeypatch.context() as patched:
        patched.setattr(storage, "_sync_file_range", lambda: None)
        patched.setattr(os, "open", refuses_the_flag)
        assert not write_pattern(tmp_path / "without the system call")


def test_direct_writes_are_direct_where_this_file_system_can(tmp_path: Path) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_DIRECT
    try:
        os.close(os.open(tmp_path / "probe", flags))
    except OSError:
        pytest.skip(f"the file system of {tmp_path} has no direct writes")
    assert write_pattern(tmp_path / "x")


@pytest.mark.parametrize("code", [errno.EIO, errno.EINVAL])
def test_other_errors_of_a_write_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def fail(*args: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "pwrite", fail)
    with (
        pytest.raises(OSError, match=os.strerror(code)),
        new_file(tmp_path / "x", PAGE, direct=code == errno.EIO) as descriptor,
    ):
        write_block(descriptor, memoryview(b"x" * PAGE), 0)


def test_direct_open_may_fail_for_other_reasons(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), new_file(tmp_path / "none" / "x", PAGE, direct=True):
        pytest.fail("the block must not be entered")
