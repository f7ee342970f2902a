"""Checkpoints in the host's shared memory: the last steps of a run whose ranks died, without the disk (no torch).

They are ordinary checkpoints in a folder of /dev/shm that belongs to the run, not to its processes: whoever starts the run
again on this host finds them there, and the launcher copies the newest to the disk when the run fails for good. Memory does
not outlive the host: checkpoints on the disk are still needed.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import os
import shutil
from pathlib import Path

from anyshard.configs.errors import EnvError
from anyshard.trainer.checkpoint import catalog, retention
from anyshard.trainer.checkpoint.manifest import COMMIT
from anyshard.trainer.checkpoint.store import store_of

logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")
STAGING_BYTES = 128 * 2**20
"""Host memory of a rank on the way: writing to memory keeps up with copying."""
STATES = 2
"""States that are held at a time: the newest, and the one that is being written."""
COPY_BYTES = 16 * 2**20


def folder_of(run_dir: Path) -> Path:
    """Where the checkpoints of a run are in shared memory; on every host the same name."""
    name = hashlib.blake2b(str(run_dir.resolve()).encode(), digest_size=8).hexdigest()
    return SHARED_MEMORY / f"anyshard-{os.getuid()}-{name}"


def make(folder: Path) -> None:
    """Make the folder, for this user alone.

    Raises:
        EnvError: it cannot be made, or is someone else's.
    """
    instead = "Set checkpoint.ram_every_steps=0 to do without."
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise EnvError(f"checkpoint.ram_every_steps: {folder} cannot be made ({error.strerror}). {instead}") from error
    if not folder.is_dir() or folder.is_symlink() or status.st_uid != os.getuid():
        raise EnvError(f"checkpoint.ram_every_steps: {folder} is not a folder of this user. Remove it. {instead}")


def newest_step(directory: Path) -> int:
    """The highest step of a checkpoint by name; -1 where there is none. Reads no file."""
    steps = [catalog.step_of(path) for path in directory.iterdir()] if directory.is_dir() else []
    return max((step for step in steps if step is not None), default=-1)


def drain(folder: Path, directory: Path) -> Path | None:
    """Copy the newest sound checkpoint from memory to the disk, all or nothing, unless as new a sound one is there.

    Returns:
        The new checkpoint; None when there was nothing to copy.

    Raises:
        OSError: it cannot be written; the one in memory stays.
    """
    on_disk = max((found.step for found in catalog.list_checkpoints(directory) if found.problem is None), default=-1)
    for found in catalog.list_checkpoints(folder):
        if found.step <= on_disk:
            return None
        damages = catalog.verify(found.path) if found.problem is None else [found.problem]
        if not damages:
            return _copy(found.path, directory)
        logger.warning("the checkpoint %s in memory is damaged and is passed over: %s", found.path, damages[0])
    return None


def _copy(source: Path, directory: Path) -> Path:
    store = store_of(directory)
    begun = store.begin(source.name)
    block = mmap.mmap(-1, COPY_BYTES)  # aligned, as writing past the page cache wants it
    try:
        for path in sorted(path for path in source.iterdir() if path.name not in (COMMIT, retention.LEASE)):
            size = path.stat().st_size
            if path.suffix != ".bin":
                store.write(begun / path.name, path.read_bytes())
                continue
            with path.open("rb", buffering=0) as file, store.data_file(begun / path.name, size) as write:
                for offset in range(0, size, COPY_BYTES):
                    write(memoryview(block)[: file.readinto(block)], offset)
        final = store.publish(begun, source.name, (source / COMMIT).read_bytes(), _pass)
    except BaseException:
        store.abandon(begun)
        raise
    (final / retention.LEASE).unlink()
    return final


def _pass(point: str) -> None:
    """A crash here is a crash like any other."""


def discard(folder: Path) -> None:
    """Free the memory."""
    shutil.rmtree(folder, ignore_errors=True)
