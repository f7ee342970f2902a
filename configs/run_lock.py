"""One live run for each run directory, and one start of it at a time.

Rank 0 holds the lock of the run. Who starts ranks (the launcher for as long as they live, else rank 0 itself) holds the
lock of the start around everything that it writes, so that ranks train what their own start has frozen. A lock belongs to
an open file (flock): it ends with the process that holds it, however that ends. A file system that has no such locks
protects nothing, and stops nobody.
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from anyshard.configs.errors import EnvError
from anyshard.configs.writing import writing

RUN_LOCK = ".lock"
START_LOCK = ".start.lock"

LAUNCHER_VARIABLE = "ANYSHARD_LAUNCHER"
"""Set for ranks whose launcher holds the lock of the start: the launcher's process id."""


@contextmanager
def only_run(run_dir: Path, name: str = RUN_LOCK, *, wait_s: float = 5.0) -> Iterator[None]:
    """Be the only run (or the only start) in this directory until the block ends; the directory is made.

    Args:
        name: `RUN_LOCK` or `START_LOCK`.
        wait_s: time that an earlier run has to finish ending.

    Raises:
        EnvError: another run is alive in it, or it cannot be written.
    """
    with writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run_dir / name, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        deadline = time.monotonic() + wait_s
        while not _take(descriptor):
            if time.monotonic() > deadline:
                raise _taken(run_dir, name)
            time.sleep(0.05)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode())
        yield
    finally:
        os.close(descriptor)


def check_free(run_dir: Path) -> None:
    """Refuse a directory in which a run is alive; nothing is made.

    Raises:
        EnvError: there is one.
    """
    try:
        descriptor = os.open(run_dir / RUN_LOCK, os.O_RDWR)
    except OSError:
        return  # no run was ever here, or `check_writable` has more to say
    try:
        if not _take(descriptor):
            raise _taken(run_dir, RUN_LOCK)
    finally:
        os.close(descriptor)


def _take(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def _taken(run_dir: Path, name: str) -> EnvError:
    try:
        holder = (run_dir / name).read_text().strip() or "another process"
    except OSError:
        holder = "another process"
    return EnvError(
        f"run.dir={run_dir}: a run is alive in it ({holder}). "
        f"End it with 'anyshard runs stop {run_dir}', or choose another run.dir."
    )
