"""Work that is done once per node and kept: a lock, a temporary name, one rename.

Every rank calls `build_once` with the same target; the one that takes the lock builds, the others wait for it. A
target exists if and only if it is complete, so a killed build leaves nothing that could be taken for a result.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import xxhash
from filelock import FileLock, Timeout

from anyshard.configs import schema
from anyshard.configs.errors import EnvError

_WAIT_NOTICE_S = 15.0


def cache_root(data: schema.Data) -> Path:
    """Folder of everything cached: data.cache_dir, else $ANYSHARD_CACHE, else ~/.cache/anyshard."""
    chosen = data.cache_dir or os.environ.get("ANYSHARD_CACHE") or "~/.cache/anyshard"
    return Path(chosen).expanduser().absolute()


def fingerprint(*parts: object) -> str:
    """32 hex digits that change with any of the parts (of which the repr counts)."""
    return xxhash.xxh3_128_hexdigest("\x1f".join(repr(part) for part in parts).encode())


def build_once(
    target: Path,
    *,
    damage: Callable[[Path], str | None],
    build: Callable[[Path], None],
    say: Callable[[str], None],
    what: str,
) -> Path:
    """Make the folder `target` unless a sound one is there; returns it.

    Blocks while another process builds the same target.

    Args:
        damage: what is wrong with an existing folder, or None when it is sound.
        build: fills the empty folder that it is given, which then gets the name `target`.
        what: the thing being built, for messages.

    Raises:
        EnvError: the cache cannot be written, or the disk is full.
    """
    if target.is_dir() and damage(target) is None:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(target, error) from error
    try:
        with _locked(target, say=say, what=what):
            reason = damage(target) if target.is_dir() else None
            if target.is_dir() and reason is None:
                return target
            if reason is not None:
                say(f"{what}: the cached copy in {target} is damaged ({reason}); building it again")
            _build_and_rename(target, build)
    except OSError as error:
        ours = str(error.filename or "").startswith(str(target.parent))
        if ours or error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _cannot_write(target, error) from error
        raise
    return target


def _locked(target: Path, *, say: Callable[[str], None], what: str) -> FileLock:
    """An acquired lock of `target`; says every so often that it waits, and for whom."""
    lock = FileLock(target.with_name(f"{target.name}.lock"))
    while True:
        try:
            lock.acquire(timeout=_WAIT_NOTICE_S)
            return lock
        except Timeout:
            written = sum(file.stat().st_size for tmp in _unfinished(target) for file in tmp.glob("*"))
            say(f"{what}: waiting for another process to finish it ({written / 1e6:.0f} MB written, lock {lock.lock_file})")


def _unfinished(target: Path) -> list[Path]:
    return list(target.parent.glob(f".{target.name}.tmp-*"))


def _build_and_rename(target: Path, build: Callable[[Path], None]) -> None:
    for stale in _unfinished(target):  # we hold the lock: whoever wrote these is gone
        shutil.rmtree(stale, ignore_errors=True)
    tmp = target.with_name(f".{target.name}.tmp-{socket.gethostname()}-{os.getpid()}")
    tmp.mkdir()
    try:
        build(tmp)
        if target.exists():
            os.rename(target, tmp / "damaged")  # readers that have it open keep their pages
            shutil.rmtree(tmp / "damaged")
        os.rename(tmp, target)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def _cannot_write(target: Path, error: OSError) -> EnvError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return EnvError(f"{target.parent}: the disk is full. Free some space, or set data.cache_dir to a folder with more.")
    return EnvError(
        f"{target.parent}: the cache of tokenised data cannot be written ({error.strerror or error}). "
        "Set data.cache_dir (or $ANYSHARD_CACHE) to a folder that can."
    )
