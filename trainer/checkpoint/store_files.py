"""Checkpoints in a local or parallel file system: written under a temporary name, committed by renaming the directory."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from anyshard.trainer.checkpoint import retention
from anyshard.trainer.checkpoint.manifest import COMMIT
from anyshard.trainer.checkpoint.storage import new_file, replace_durably, sync_directory, write_block, write_durably
from anyshard.trainer.checkpoint.store import Reach, Write

LATEST = "latest"
"""Advisory file with the name of the newest checkpoint, for people and scripts; nothing here reads it."""


class FileStore:
    """A directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def begin(self, name: str) -> Path:
        """A temporary directory."""
        return retention.make_temporary(self.directory, name)

    @contextlib.contextmanager
    def data_file(self, path: Path, num_bytes: int) -> Iterator[Write]:
        """Past the page cache where the file system can; the space is reserved first."""
        with new_file(path, num_bytes, direct=True) as descriptor:
            yield lambda data, offset: write_block(descriptor, data, offset)

    def write(self, path: Path, data: bytes) -> None:
        """Written and synced."""
        write_durably(path, data)

    def publish(self, begun: Path, name: str, commit: bytes, reach: Reach) -> Path:
        """COMMIT, and a rename."""
        final = self.directory / name
        write_durably(begun / COMMIT, commit)
        sync_directory(begun)
        reach("committed")
        retention.publish(begun, final)
        reach("renamed")
        return final

    def tidy(self, final: Path, stay: retention.Retention) -> None:
        """As in `Store`."""
        (final / retention.LEASE).unlink()
        replace_durably(self.directory / LATEST, f"{final.name}\n".encode())
        retention.retain(self.directory, stay, self.remove)
        retention.collect(self.directory)

    def abandon(self, begun: Path) -> None:
        """As in `Store`."""
        shutil.rmtree(begun, ignore_errors=True)

    def collect(self) -> list[str]:
        """As in `Store`."""
        return retention.collect(self.directory)

    def being_written(self) -> list[Path]:
        """As in `Store`."""
        return retention.being_written(self.directory)

    def remove(self, path: Path) -> None:
        """As in `Store`."""
        retention.remove(path)

    def set_aside(self, after_step: int) -> list[str]:
        """As in `Store`."""
        return retention.set_aside(self.directory, after_step)
