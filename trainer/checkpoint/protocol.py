"""How all ranks make one checkpoint out of what each has copied: all or nothing, and the same outcome on every rank.

    rank 0 makes a temporary directory -> every rank writes and syncs its data file and manifest -> all agree that it
    worked -> rank 0 checks the sizes, writes COMMIT, syncs, renames, syncs the parent -> all hear of it -> retention

A failure at any point is the same CheckpointError on every rank, and nothing of the save is left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from anyshard.configs.errors import CheckpointError, DiskFullError
from anyshard.configs.places import place
from anyshard.trainer.checkpoint import catalog, retention
from anyshard.trainer.checkpoint.exchange import Exchange
from anyshard.trainer.checkpoint.faults import Faults
from anyshard.trainer.checkpoint.manifest import Commit, FileRef, data_name, dump_commit
from anyshard.trainer.checkpoint.store import Store
from anyshard.trainer.checkpoint.writer import Written, file_bytes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Protocol:
    """Saves to one directory.

    Args:
        stay: which of them stay.
    """

    store: Store
    stay: retention.Retention
    ranks: Exchange
    faults: Faults

    def save(
        self, step: int, write: Callable[[Path], Written], record: Callable[[], Commit], persisted: Callable[[int], None]
    ) -> tuple[Path, int]:
        """Write and commit the checkpoint of `step`.

        Collective: every rank calls it; it blocks until the checkpoint is committed or has failed.

        Args:
            write: writes this rank's files into the directory that it is given.
            record: on rank 0, COMMIT without the manifests.
            persisted: called with the size of all data once it is on the disk.

        Returns:
            The checkpoint, and the size of its data.

        Raises:
            CheckpointError: it failed, on any rank; the same on all. No trace of it is left, earlier ones are intact.
            DiskFullError: that was why.
        """
        final = self.store.directory / catalog.checkpoint_name(step)
        temporary: Path | None = None
        try:
            self.ranks.meet()
            temporary = place(self.ranks.on_first(lambda: str(self.store.begin(final.name))))
            self.faults.reach("temporary")
            written = self.ranks.everywhere(lambda: asdict(self._write(write, temporary, final)))
            self.faults.reach("gathered")
            num_bytes = sum(part["data_bytes"] for part in written)
            persisted(num_bytes)
            self.ranks.on_first(lambda: self._commit(record(), temporary, final, written))
        except CheckpointError as error:
            if self.ranks.rank == 0 and temporary is not None:
                with contextlib.suppress(Exception):  # what is left is collected later
                    self.store.abandon(temporary)
            text = str(error).rstrip(".").replace(str(temporary), str(final))
            if isinstance(error, DiskFullError):
                text += ". Free some space on this disk, lower checkpoint.keep, or set checkpoint.dir to a folder on another"
            raise type(error)(f"step {step} was not saved: {text}.") from error
        return final, num_bytes

    def _write(self, write: Callable[[Path], Written], temporary: Path, final: Path) -> Written:
        theirs = temporary.name.partition(".")[0]
        if theirs != final.name:
            raise CheckpointError(f"this rank saves {final.name} while rank 0 saves {theirs}")
        written = write(temporary)
        self.faults.reach("persisted")
        return written

    def _commit(self, record: Commit, temporary: Path, final: Path, written: list[dict[str, Any]]) -> None:
        """Rank 0: make the checkpoint exist, then drop the ones that it makes superfluous."""
        refs = [FileRef(**part["manifest"]) for part in written]
        for rank, (ref, part) in enumerate(zip(refs, written, strict=True)):
            for name, size in ((data_name(rank), part["data_bytes"]), (ref.file, ref.nbytes)):
                if file_bytes(temporary / name) != size:
                    raise CheckpointError(
                        f"{temporary / name} has {file_bytes(temporary / name)} bytes, rank {rank} wrote {size}."
                    )
        commit = dump_commit(dataclasses.replace(record, manifests=refs))
        self.store.publish(temporary, final.name, commit, self.faults.reach)
        try:
            self.store.tidy(final, self.stay)
        except Exception as error:  # the checkpoint exists: nothing here may undo that
            logger.warning("after the save of %s: %s", final.name, error)
