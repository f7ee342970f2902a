"""Checkpoints in an object store, through fsspec: files go up in parts under their final names, COMMIT is the last object.

An object exists once its upload ends, or not at all, and there is no rename. So a folder is a checkpoint if and only if it
holds COMMIT; to remove one begins with COMMIT. Whoever saves a step again removes the older checkpoint of that step first: the
ones before it stay.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from anyshard.trainer.checkpoint import catalog, retention
from anyshard.trainer.checkpoint.manifest import COMMIT
from anyshard.trainer.checkpoint.multipart import Upload
from anyshard.trainer.checkpoint.store import Reach, Write

PART_BYTES = 16 * 2**20
MAX_PARTS = 9000
"""Stores take 10,000 parts of a file."""
LATEST = "latest"


class ObjectStore:
    """A folder of a bucket.

    Args:
        directory: a `UPath`, from `configs.places.place`.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def begin(self, name: str) -> Path:
        """The final folder, emptied."""
        folder = self.directory / name
        if (folder / COMMIT).exists():
            self.remove(folder)
        else:
            self.abandon(folder)
        (folder / retention.LEASE).write_bytes(retention.lease())
        return folder

    @contextlib.contextmanager
    def data_file(self, path: Path, num_bytes: int) -> Iterator[Write]:
        """Uploaded in parts, each as soon as it is full, on S3 several at a time; nothing is left of an upload that fails."""
        part_bytes = max(PART_BYTES, -(-num_bytes // MAX_PARTS))
        system = _system(path)
        if hasattr(system, "call_s3"):
            bucket, key, _ = system.split_path(str(path))
            with _uploaded(Upload(system.call_s3, bucket, key, part_bytes=part_bytes)) as upload:
                yield lambda data, offset: upload.write(data)
            return
        file: Any = system.open(str(path), "wb", block_size=part_bytes)
        try:
            yield lambda data, offset: _append(file, data, offset)
        except BaseException:
            with contextlib.suppress(Exception):
                getattr(file, "discard", _nothing)()
            file.closed = True  # otherwise its destructor would finish it
            raise
        file.close()

    def write(self, path: Path, data: bytes) -> None:
        """One object."""
        path.write_bytes(data)

    def publish(self, begun: Path, name: str, commit: bytes, reach: Reach) -> Path:
        """COMMIT."""
        reach("committed")
        (begun / COMMIT).write_bytes(commit)
        reach("renamed")
        return begun

    def tidy(self, final: Path, stay: retention.Retention) -> None:
        """As in `Store`."""
        (final / retention.LEASE).unlink()
        (self.directory / LATEST).write_bytes(f"{final.name}\n".encode())
        retention.retain(self.directory, stay, self.remove)
        self.collect()

    def abandon(self, begun: Path) -> None:
        """As in `Store`."""
        with contextlib.suppress(FileNotFoundError):
            _system(begun).rm(str(begun), recursive=True)

    def _begun(self) -> list[Path]:
        """Folders without COMMIT, those that were set aside excepted."""
        found = [path for path in _names_in(self.directory) if catalog.step_of(path) is not None]
        return [path for path in found if not any(each.name.startswith(COMMIT) for each in path.iterdir())]

    def collect(self) -> list[str]:
        """As in `Store`."""
        left = [path for path in self._begun() if _writer_is_dead(path)]
        for path in left:
            self.abandon(path)
        return [path.name for path in left]

    def being_written(self) -> list[Path]:
        """As in `Store`."""
        return [path for path in self._begun() if not _writer_is_dead(path)]

    def remove(self, path: Path) -> None:
        """COMMIT first."""
        (path / COMMIT).unlink()
        self.abandon(path)

    def set_aside(self, after_step: int) -> list[str]:
        """COMMIT gets another name."""
        renamed = []
        for found in catalog.list_checkpoints(self.directory):
            if found.step > after_step:
                aside = found.path / f"{COMMIT}.abandoned-{uuid.uuid4().hex}"
                aside.write_bytes((found.path / COMMIT).read_bytes())
                (found.path / COMMIT).unlink()
                renamed.append(f"{found.path.name}/{aside.name}")
        return renamed


@contextlib.contextmanager
def _uploaded(upload: Upload) -> Iterator[Upload]:
    try:
        yield upload
        upload.finish()
    except BaseException:
        upload.abort()
        raise


def _names_in(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []


def _system(path: Any) -> Any:
    """fsspec's file system of a path."""
    return path.fs


def _append(file: Any, data: memoryview, offset: int) -> None:
    assert file.tell() == offset, "blocks come in order"
    file.write(data)


def _nothing() -> None:
    """A file that has nothing to give up."""


def _writer_is_dead(folder: Path) -> bool:
    lease = folder / retention.LEASE
    try:
        return retention.holder_is_dead(lease.read_bytes(), lease.stat().st_mtime)
    except FileNotFoundError:
        return True  # the lease is the first object that is written and the last but COMMIT's that goes
