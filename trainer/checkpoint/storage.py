"""Writing that survives a crash: reserved space, whole writes, fsync of files and directories, atomic replacement.

Large files are written past the page cache (O_DIRECT) where the file system can: that is the disk's full rate at next to no
processor time. Elsewhere the system is told to start writing each part at once, so that the sync at the end finds little.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def new_file(path: Path, num_bytes: int, *, direct: bool = False) -> Iterator[int]:
    """A new file with `num_bytes` reserved on the disk, open for writing; synced when the block ends without an error.

    Args:
        direct: past the page cache where the file system can; write it with `write_block`.

    Raises:
        OSError: the disk is full (found before anything is written), the file exists, ...
    """
    descriptor = _create(path, direct=direct)
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


def _create(path: Path, *, direct: bool) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    if direct and hasattr(os, "O_DIRECT"):
        try:
            return os.open(path, flags | os.O_DIRECT, 0o644)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            path.unlink(missing_ok=True)  # Linux makes the file before it finds that it cannot open it so
    return os.open(path, flags, 0o644)


def is_direct(descriptor: int) -> bool:
    """Whether writes to it go past the page cache."""
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0))


def write_block(descriptor: int, data: memoryview, offset: int) -> None:
    """Write a block of a large file; for direct writing its address, length and offset are multiples of 4 KiB.

    A file system that takes the flag and then refuses the writes gets them through the page cache.
    """
    try:
        write_at(descriptor, data, offset)
    except OSError as error:
        if error.errno != errno.EINVAL or not is_direct(descriptor):
            raise
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_DIRECT)
        write_at(descriptor, data, offset)
    if not is_direct(descriptor):
        _write_back_early(descriptor, offset, len(data))


def _write_back_early(descriptor: int, offset: int, num_bytes: int) -> None:
    """Have the system write a part now, and forget what it has written before; a hint, so nothing can fail."""
    start = _sync_file_range()
    if start is not None:
        start(descriptor, offset, num_bytes, 2)  # SYNC_FILE_RANGE_WRITE: begin, do not wait
        os.posix_fadvise(descriptor, 0, offset, os.POSIX_FADV_DONTNEED)


@functools.cache
def _sync_file_range() -> Any:
    """The system call, on Linux."""
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return function


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
