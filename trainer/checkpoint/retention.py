"""Which checkpoints stay, and what a crash left behind (pure decisions, then deletions that a crash cannot make look whole).

Names in a directory of checkpoints:

    step-00000100                    exists if and only if it is complete
    step-00000100.tmp-<uuid>         being written; holds LEASE, which says by whom
    step-00000100.replaced-<uuid>    an older checkpoint of a step that is being saved again
    step-00000100.trash-<uuid>       being deleted
    step-00000100.abandoned-<uuid>   of a branch that its run went back from; nothing here touches it again
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from anyshard.trainer.checkpoint.catalog import Found, list_checkpoints, read_commit
from anyshard.trainer.checkpoint.storage import sync_directory

logger = logging.getLogger(__name__)

LEASE = "LEASE"
_LEFTOVER = re.compile(r"(step-\d{8,})\.(tmp|replaced|trash)-[0-9a-f]{32}")
FOREIGN_LEASE_S = 24 * 3600.0
"""A lease of another host cannot be checked from here: its directory goes when it is older than any save."""
YOUNG_S = 60.0
"""A temporary directory without a readable lease may be about to get one."""


@dataclass(frozen=True)
class Retention:
    """Which checkpoints of a run stay.

    Attributes:
        keep: newest sound ones; 0: all.
        keep_every: sound ones whose step is a multiple of this stay as well; 0: none do.
        best_metric: the sound one with the best value of this number of the evaluation stays as well; None: none does.
        best_is_highest: whether the highest value is the best.
    """

    keep: int
    keep_every: int = 0
    best_metric: str | None = None
    best_is_highest: bool = False


def sibling(path: Path, kind: str) -> Path:
    """A new name of the given kind ("tmp", "replaced", "trash", "abandoned") beside a checkpoint."""
    return path.with_name(f"{path.name}.{kind}-{uuid.uuid4().hex}")


def lease() -> bytes:
    """Who is writing: enough to tell later whether that process still lives."""
    process = psutil.Process()
    content = {"host": socket.gethostname(), "pid": process.pid, "boot": boot_id(), "started": process.create_time()}
    return json.dumps(content).encode()


def boot_id() -> str:
    """Changes with every boot of this machine; empty where the system does not say."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def writer_is_dead(directory: Path, now_s: float | None = None) -> bool:
    """Whether the process that holds the lease of a temporary directory is certainly gone."""
    try:
        content = (directory / LEASE).read_bytes()
    except OSError:
        content = b""
    return holder_is_dead(content, directory.stat().st_mtime, now_s)


def holder_is_dead(lease: bytes, changed_s: float, now_s: float | None = None) -> bool:
    """Whether the process that holds a lease is certainly gone.

    Args:
        changed_s: when something last changed where the lease is, seconds since the epoch.
    """
    age_s = (time.time() if now_s is None else now_s) - changed_s
    try:
        content = json.loads(lease)
        host, boot, pid, started = content["host"], content["boot"], int(content["pid"]), float(content["started"])
    except (ValueError, KeyError, TypeError):
        return age_s > YOUNG_S
    if host != socket.gethostname():
        return age_s > FOREIGN_LEASE_S
    if boot != boot_id():
        return True
    try:
        return abs(psutil.Process(pid).create_time() - started) > 1.0  # another process has the number now
    except psutil.NoSuchProcess:
        return True


def collect(directory: Path) -> list[str]:
    """Remove what crashes left behind, and put back a checkpoint whose replacement was not finished.

    Returns:
        Names that were removed or put back.
    """
    if not directory.is_dir():
        return []
    done = []
    for path in sorted(directory.iterdir()):
        match = _LEFTOVER.fullmatch(path.name)
        if match is None or (match[2] == "tmp" and not writer_is_dead(path)):
            continue
        if match[2] == "replaced" and not (directory / match[1]).exists():
            path.rename(directory / match[1])
            sync_directory(directory)
        else:
            shutil.rmtree(path, ignore_errors=True)
        done.append(path.name)
    return done


def best_of(found: Sequence[Found], metric: str, *, highest: bool) -> Path | None:
    """The sound checkpoint whose evaluation gave the best finite value, the newest of equals; None when there is none."""
    scores = []
    for each in found:
        if each.problem is None:
            value = read_commit(each.path).meta.get("evaluation", {}).get(metric)
            if isinstance(value, int | float) and math.isfinite(value):
                scores.append((value if highest else -value, each.step, each.path))
    return max(scores)[2] if scores else None


def plan_removal(found: Sequence[Found], keep: int, keep_every: int = 0, best: Path | None = None) -> list[Path]:
    """Checkpoints to remove so that the `keep` newest sound ones stay; 0 keeps all.

    A damaged one does not count, and goes once it is older than all that stay. While there is a sound one, one stays.

    Args:
        keep_every: sound ones whose step is a multiple of this stay as well; 0: none do.
        best: one more that stays.
    """
    newest_first = sorted(found, key=lambda each: each.step, reverse=True)
    sound = [each for each in newest_first if each.problem is None]
    if not keep or len(sound) <= keep:
        return []
    oldest_kept = sound[keep - 1].step
    older = [each for each in newest_first if each.step < oldest_kept and each.path != best]
    return [each.path for each in older if each.problem is not None or not keep_every or each.step % keep_every]


def being_written(directory: Path) -> list[Path]:
    """Temporary directories whose writer may be alive: a save is going on."""
    if not directory.is_dir():
        return []
    matches = [(path, _LEFTOVER.fullmatch(path.name)) for path in sorted(directory.iterdir())]
    return [path for path, match in matches if match is not None and match[2] == "tmp" and not writer_is_dead(path)]


def set_aside(directory: Path, after_step: int) -> list[str]:
    """Rename the checkpoints of later steps, once a run goes back: they are of a branch that it leaves.

    They are not deleted, here or later. Left in place they would be taken for the newest ones.

    Returns:
        Their new names.
    """
    renamed = []
    for found in list_checkpoints(directory):
        if found.step > after_step:
            aside = sibling(found.path, "abandoned")
            found.path.rename(aside)
            renamed.append(aside.name)
    if renamed:
        sync_directory(directory)
    return renamed


def remove(path: Path) -> None:
    """Remove a checkpoint; from the first moment on it is not a checkpoint any more."""
    trash = sibling(path, "trash")
    path.rename(trash)
    sync_directory(path.parent)
    shutil.rmtree(trash)


def retain(directory: Path, rule: Retention, remove_one: Callable[[Path], None] | None = None) -> list[str]:
    """Apply `plan_removal`; returns the names removed. A failure is logged: it must not end a run."""
    if not rule.keep:
        return []
    removed, found = [], list_checkpoints(directory)
    best = None
    if rule.best_metric is not None:
        best = best_of(found, rule.best_metric, highest=rule.best_is_highest)
    for path in plan_removal(found, rule.keep, rule.keep_every, best):
        try:
            (remove_one or remove)(path)
            removed.append(path.name)
        except OSError as error:
            logger.warning("the old checkpoint %s could not be removed: %s", path, error)
    return removed


def publish(temporary: Path, final: Path) -> None:
    """Give a complete checkpoint its name, durably; an older one of the same step stays until the new one is in place.

    Raises:
        OSError: it could not be done; `final` is as it was.
    """
    replaced = sibling(final, "replaced") if final.exists() else None
    if replaced is not None:
        final.rename(replaced)
    try:
        temporary.rename(final)
        sync_directory(final.parent)
    except OSError:
        if final.exists():
            final.rename(temporary)
        if replaced is not None:
            replaced.rename(final)
        raise
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def make_temporary(directory: Path, name: str) -> Path:
    """A temporary directory for the checkpoint `name`, with a lease of this process; the way to it is durable."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    if missing:  # the run directory above is new as well, and nobody has synced its name
        for path in (*missing, missing[-1].parent):
            sync_directory(path.parent)
    temporary = sibling(directory / name, "tmp")
    temporary.mkdir()
    descriptor = os.open(temporary / LEASE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        os.write(descriptor, lease())
    finally:
        os.close(descriptor)
    return temporary
