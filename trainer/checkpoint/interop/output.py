"""A folder that appears whole or not at all (pure: no torch; `launch` asks it as well)."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from anyshard.configs.errors import CheckpointError, ConfigError, DiskFullError, EnvError, Problem
from anyshard.configs.places import is_remote
from anyshard.trainer.checkpoint.retention import LEASE, lease, writer_is_dead
from anyshard.trainer.checkpoint.storage import is_disk_full, sync_directory, write_durably


def refuse_occupied(out: Path) -> None:
    """Refuse to write where something is.

    Raises:
        ConfigError: `out` is a file, a folder that is not empty, or in an object store.
    """
    if is_remote(out):
        reason = "what is written here appears by renaming a folder, and an object store cannot do that."
        raise ConfigError(Problem("OUT", out, reason, "Give a folder of this machine, and upload it with COMMIT last."))
    occupied = None
    if out.is_dir():
        occupied = "this folder is not empty." if any(out.iterdir()) else None
    elif out.exists() or out.is_symlink():
        occupied = "there is a file of this name."
    if occupied:
        raise ConfigError(Problem("OUT", out, occupied, "Give a new folder, or remove it first."))


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its name when the block ends; after an error nothing of it is left.

    What an earlier command that was killed left of the same name is removed first.

    Raises:
        ConfigError: something is at `out` already.
        DiskFullError: the disk is full.
        EnvError: the place cannot be written.
    """
    refuse_occupied(out)
    out = Path(os.path.abspath(out))
    temporary = out.with_name(f"{out.name}.tmp-{uuid.uuid4().hex}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(out)
        temporary.mkdir()
        write_durably(temporary / LEASE, lease())
        yield temporary
        (temporary / LEASE).unlink()
        for folder in [path for path in temporary.rglob("*") if path.is_dir()]:
            sync_directory(folder)
        sync_directory(temporary)
        refuse_occupied(out)  # while this was written, somebody else may have
        temporary.rename(out)
        sync_directory(out.parent)
    except OSError as error:
        where = str(error.filename or out).replace(str(temporary), str(out))
        if is_disk_full(error):
            raise DiskFullError(
                f"{where}: {error.strerror}. Nothing of it is left; free some space or write elsewhere."
            ) from error
        raise EnvError(f"{where}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_leftovers(out: Path) -> None:
    name = re.compile(re.escape(out.name) + r"\.tmp-[0-9a-f]{32}")
    for path in out.parent.iterdir():
        if name.fullmatch(path.name) and path.is_dir() and writer_is_dead(path):
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what the system says about a file that cannot be read into our error.

    Raises:
        CheckpointError: names the file.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{error.filename or path}: cannot be read ({error.strerror or error}).") from error
