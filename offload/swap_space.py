"""One rank's folder of swap files: claimed for one attempt of one run, checked, reserved, and removed afterwards.

DeepSpeed's asynchronous I/O looks at no result of a request: a write that fails for lack of space, or that the file system
refuses, goes unnoticed, and the state is garbage when it is read back. So what can fail is made to fail here, before the
first step: the folder is written as DeepSpeed will write it, and the swap files get all their blocks.

A folder belongs to a process: it holds a locked file, and the kernel drops the lock when the process dies, however it dies.
What nobody holds is left over, and is removed by the next rank that comes to the drive.

Source: deepspeed 0.19.8 ops/csrc/aio/common/deepspeed_aio_common.cpp:112 (`_do_io_complete`), :267 (`open_file`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import mmap
import os
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from anyshard.configs.errors import EnvError
from anyshard.offload.derive import ALIGNED_BYTES

PARENT, LOCK, CLAIMING = "anyshard-swap", "LOCK", ".claiming-"
CLAIM_AGE_S = 60.0
"""A folder is without its lock for much less; an older one is of a process that died in between."""
GIB = 2**30
MEMORY_KINDS = ("tmpfs", "ramfs")


class SwapSpace:
    """A claimed folder; use it as a context manager.

    Attributes:
        folder: for `nvme_path` of DeepSpeed.
        removed: folders of dead ranks that were removed on the way.
    """

    def __init__(self, folder: Path, lock: int, removed: Sequence[Path]) -> None:
        self.folder, self.removed = folder, list(removed)
        self._lock = lock

    @classmethod
    def claim(cls, drive: str, *, run: Path, rank: int, key: str = "offload.nvme_path") -> SwapSpace:
        """Make a folder of this process on a drive.

        Args:
            drive: a path of `offload.nvme_path`.
            run: the run directory, which names the run.

        Raises:
            EnvError: nothing can be written there, or not past the cache of the file system.
        """
        parent = Path(drive).expanduser().absolute() / PARENT
        try:
            parent.mkdir(parents=True, exist_ok=True)
            removed = remove_leftovers(parent)
            folder, lock = _make(parent, run, rank)
        except OSError as error:
            raise EnvError(
                f"{key}={drive}: {_why(error)} Set it to a folder on a local drive that this user writes."
            ) from error
        space = cls(folder, lock, removed)
        try:
            _require_direct(folder, drive, key)
        except EnvError:
            space.close()
            raise
        return space

    def __enter__(self) -> SwapSpace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the folder with everything in it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.close(self._lock)

    def reserve(self, files: Mapping[Path, int]) -> None:
        """Give files all their blocks, so that no later write can lack space.

        Args:
            files: path -> size in bytes.

        Raises:
            EnvError: there is too little space; what was reserved is given back.
        """
        made: list[Path] = []
        try:
            for path, num_bytes in files.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
                made.append(path)
                try:
                    os.posix_fallocate(descriptor, 0, num_bytes)
                finally:
                    os.close(descriptor)
        except OSError as error:
            for path in made:
                path.unlink(missing_ok=True)
            raise EnvError(self._no_space(sum(files.values()), error)) from error

    def require_whole(self, files: Mapping[Path, int]) -> None:
        """Refuse swap files that DeepSpeed could not write in full, of which it says nothing.

        Raises:
            EnvError: one is missing, or shorter than it has to be.
        """
        for path, num_bytes in files.items():
            status = path.stat() if path.exists() else None
            if status is None or status.st_size < num_bytes or status.st_blocks * 512 < num_bytes:
                full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                raise EnvError(self._no_space(sum(files.values()), full))

    def _no_space(self, num_bytes: int, error: OSError) -> str:
        free = shutil.disk_usage(self.folder).free
        return (
            f"offload.nvme_path: {self.folder.parent.parent} has {free / GIB:.2f} GiB free, and this rank's swap files take "
            f"{num_bytes / GIB:.2f} GiB ({error.strerror}). Free some, or set another drive or more ranks."
        )

    def used_bytes(self) -> int:
        """Space that the files of this rank take on the drive."""
        return sum(file.stat().st_blocks * 512 for file in self.folder.rglob("*.swp"))

    def trouble(self) -> str | None:
        """What is wrong with the folder now, in words; None where it is as it was made."""
        drive = self.folder.parent.parent
        if not (self.folder / LOCK).exists():
            return f"offload.nvme_path: {drive} is gone, with the swap files of this rank in {self.folder}. Mount it again"
        try:
            if os.statvfs(self.folder).f_flag & os.ST_RDONLY:
                return f"offload.nvme_path: {drive} is read-only now. Look at the drive, mount it again"
            _write_direct(self.folder / "check", 4096)
        except OSError as error:
            return f"offload.nvme_path: {drive} does not take writes any more: {_why(error)} Look at the drive"
        return None


def drive_of(paths: str, local_rank: int) -> str:
    """The drive of a rank: `offload.nvme_path` may name several with commas between, which ranks take in turn."""
    drives = [path.strip() for path in paths.split(",") if path.strip()]
    return drives[local_rank % len(drives)]


def file_system(path: Path) -> str:
    """Kind of the file system that a path is on, such as "ext4"; "" where it is not known."""
    mounts = [part for part in psutil.disk_partitions(all=True) if path.resolve().is_relative_to(part.mountpoint)]
    return str(max(mounts, key=lambda part: len(part.mountpoint)).fstype) if mounts else ""


def remove_leftovers(parent: Path) -> list[Path]:
    """Remove the folders that no process holds, and return them."""
    removed = []
    for folder in parent.iterdir() if parent.is_dir() else ():
        if folder.is_dir() and _is_left(folder):
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder)
    return removed


def _is_left(folder: Path) -> bool:
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR)
    except FileNotFoundError:  # being made, or removed; or its process died in between
        with contextlib.suppress(FileNotFoundError):
            return time.time() - folder.stat().st_mtime > CLAIM_AGE_S
        return False
    except OSError:  # another user's
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _make(parent: Path, run: Path, rank: int) -> tuple[Path, int]:
    name = hashlib.blake2b(str(run.resolve()).encode(), digest_size=4).hexdigest()
    attempt = f"{name}-rank{rank:05d}-{uuid.uuid4().hex[:8]}"
    making = parent / f"{CLAIMING}{attempt}"
    making.mkdir(mode=0o700)
    lock = os.open(making / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.write(lock, f"{run}\npid {os.getpid()}\n".encode())
    return making.rename(parent / attempt), lock


def _require_direct(folder: Path, drive: str, key: str) -> None:
    try:
        _write_direct(folder / "check", 4096)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise EnvError(f"{key}={drive}: {_why(error)} Set it to a folder with free space.") from error
        kind = file_system(folder) or "its"
        raise EnvError(
            f"{key}={drive}: {kind} file system does not do direct I/O, and DeepSpeed reads and writes past the cache only. "
            "Set it to a folder on ext4 or xfs."
        ) from error
    try:
        _write_direct(folder / "check", ALIGNED_BYTES)
    except OSError as error:
        raise EnvError(
            f"{key}={drive}: the drive writes no less than 4096 bytes at a time, and DeepSpeed pads to {ALIGNED_BYTES} "
            "(runtime/swap_tensor/utils.py:15): what it writes would be lost. Use a drive with sectors of 512 bytes."
        ) from error


def _write_direct(path: Path, num_bytes: int) -> None:
    buffer = mmap.mmap(-1, 4096)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
    try:
        os.pwrite(descriptor, memoryview(buffer)[:num_bytes], num_bytes)
    finally:
        os.close(descriptor)
        path.unlink()


def _why(error: OSError) -> str:
    return f"{error.strerror} ({error.filename})." if error.filename else f"{error.strerror}."
