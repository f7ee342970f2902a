"""Writing into folders that people name: errors that say which key to change, and files that are whole or not there."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from anyshard.configs.errors import EnvError


def write_file(file: Path, text: str) -> None:
    """Write a file of the run directory; an older one stays until the new one is whole.

    Raises:
        EnvError: it cannot be written.
    """
    partial = file.with_name(f".{file.name}.tmp")
    with writing(file.parent):
        try:
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, file)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


@contextmanager
def writing(folder: Path, key: str = "run.dir") -> Iterator[None]:
    """Turn what the system says about a folder that cannot be written into our error.

    Raises:
        EnvError: the disk is full, a file is in the way, it is read-only, ...
    """
    try:
        yield
    except OSError as error:
        raise cannot_write(key, folder, error) from error


def cannot_write(key: str, folder: Path, error: OSError) -> EnvError:
    """The error for a folder of ours that cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return EnvError(f"{key}={folder}: the disk is full. Free some space, or set {key} to a folder on another disk.")
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return EnvError(f"{key}={folder}: a file is in the way of this folder. Move it, or set {key} to another folder.")
    return EnvError(f"{key}={folder}: it cannot be written ({error.strerror}). Set {key} to a folder that can.")


def check_writable(key: str, folder: Path) -> None:
    """Refuse a folder that could not be made or written; nothing is made.

    Raises:
        EnvError: a file is in the way, or the permission is missing, or the file system is read-only.
    """
    nearest = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    with writing(folder, key):
        if not nearest.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(nearest, os.W_OK | os.X_OK):
            code = errno.EROFS if os.statvfs(nearest).f_flag & os.ST_RDONLY else errno.EACCES
            raise OSError(code, os.strerror(code))
