"""Writing that survives a crash: reserved space, whole writes, fsync of files and directories, atomic replacement."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_file(path: Path, num_bytes: int) -> Iterator[int]:
    """A new file with `num_bytes` reserved on the disk, open for writing; synced when the block ends without an error.

    Raises:
        OSError: the disk is full (found before anything is written), the file exists, ...
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        if num_bytes:
            _reserve(descriptor, num_bytes)
        yield descriptor
        os.fsync(descriptor)
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno, _told(error, descriptor, num_bytes), str(path)) from error
        raise
    finally:
        os.close(descriptor)


def is_disk_full(error: BaseException) -> bool:
    """Whether it says that there is no space, or no more for this user."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _told(error: OSError, descriptor: int, num_bytes: int) -> str:
    """What the system says, and how much space a full disk lacks."""
    if not is_disk_full(error):
        return error.strerror or str(error)
    space = os.fstatvfs(descriptor)
    return f"{error.strerror} (it needs {num_bytes:,} bytes, {space.f_bavail * space.f_frsize:,} are free)"


def _reserve(descriptor: int, num_bytes: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # the file system cannot: find out while writing
            raise
        os.ftruncate(descriptor, num_bytes)


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset`."""
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def write_durably(path: Path, data: bytes) -> None:
    """Write a new file and sync it."""
    with new_file(path, len(data)) as descriptor:
        write_at(descriptor, memoryview(data), 0)


def replace_durably(path: Path, data: bytes) -> None:
    """Replace a file by another in one step: a reader sees the old or the new, never a part."""
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        write_durably(beside, data)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
