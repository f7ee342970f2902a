"""What a save needs of the place where checkpoints are kept. One file for each kind of place.

All of them keep one promise: a checkpoint exists from one moment on, whole, and nothing before can be taken for one.
A file system makes it by renaming a directory (`store_files.py`), an object store by one last object (`store_objects.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from anyshard.configs.places import is_remote
from anyshard.trainer.checkpoint.retention import Retention

Write = Callable[[memoryview, int], None]
"""Writes a block of a data file at an offset; blocks come in order."""
Reach = Callable[[str], None]


class Store(Protocol):
    """The checkpoints of one folder. Errors are OSErrors, as the system or the library has them."""

    @property
    def directory(self) -> Path:
        """The folder."""

    def begin(self, name: str) -> Path:
        """A place for the files of a new checkpoint, with a lease of this process."""

    def data_file(self, path: Path, num_bytes: int) -> AbstractContextManager[Write]:
        """A new file of a known size, durable when the block ends without an error."""

    def write(self, path: Path, data: bytes) -> None:
        """A new small file, durable."""

    def publish(self, begun: Path, name: str, commit: bytes, reach: Reach) -> Path:
        """Rank 0, when all files are written: from now on the checkpoint exists. An error leaves what was there before.

        Args:
            reach: called with "committed" just before, and with "renamed" just after it exists.
        """

    def tidy(self, final: Path, stay: Retention) -> None:
        """After `publish`: drop the lease, say which is the latest, remove what is superfluous and what crashes left."""

    def abandon(self, begun: Path) -> None:
        """Remove what was begun."""

    def collect(self) -> list[str]:
        """Remove what crashes left; returns names."""

    def being_written(self) -> list[Path]:
        """What processes that may be alive have begun."""

    def remove(self, path: Path) -> None:
        """Remove a checkpoint: from the first moment on it is none."""

    def set_aside(self, after_step: int) -> list[str]:
        """Checkpoints of later steps stop being checkpoints, without being deleted; returns their new names."""


def store_of(directory: Path) -> Store:
    """The store of a folder."""
    if is_remote(directory):
        from anyshard.trainer.checkpoint.store_objects import ObjectStore

        return ObjectStore(directory)
    from anyshard.trainer.checkpoint.store_files import FileStore

    return FileStore(directory)
