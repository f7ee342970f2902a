"""What may be on a disk after the power fails: a strict model over the recorded system calls of a program.

A file keeps what it held at its last fsync; of the writes since then any may be lost or torn. A directory keeps its entries
as of its own last fsync; of the changes since then any may be lost, one rename within a directory is one change. Nothing
else is ordered: file systems promise more, and what survives here survives on all of them.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

SECTOR = 512
Op = tuple[Any, ...]


class Recorder:
    """Records what this process does to the files under `root`, while it does it."""

    def __init__(self, root: Path) -> None:
        self.ops: list[Op] = []
        self._ids: dict[int, int] = {root.stat().st_ino: 0}
        self._next = 1

    def mark(self, *what: Any) -> None:
        """A point in the sequence that a test wants to know of."""
        self.ops.append(("mark", *what))

    def _new(self, inode: int) -> int:
        self._ids[inode], self._next = self._next, self._next + 1
        return self._ids[inode]

    def _place(self, path: Any, dir_fd: int | None) -> tuple[int, str] | None:
        """Id of the directory and name, None for what is not under the root."""
        where = Path(os.readlink(f"/proc/self/fd/{dir_fd}"), path) if dir_fd is not None else Path(path)
        try:
            parent = self._ids.get(os.stat(where.parent).st_ino)
        except OSError:
            return None
        return None if parent is None else (parent, where.name)

    def _of(self, descriptor: int) -> int | None:
        return self._ids.get(os.fstat(descriptor).st_ino)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record until the block ends."""
        real = {name: getattr(os, name) for name in ("open", "pwrite", "write", "posix_fallocate", "fsync", "mkdir", "rename")}
        real |= {name: getattr(os, name) for name in ("replace", "unlink", "rmdir")}

        def opened(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            place = self._place(path, dir_fd) if flags & os.O_CREAT else None
            descriptor: int = real["open"](path, flags, mode, dir_fd=dir_fd)
            if place is not None:
                self.ops.append(("file", *place, self._new(os.fstat(descriptor).st_ino)))
            return descriptor

        def pwrite(descriptor: int, data: Any, offset: int) -> int:
            written: int = real["pwrite"](descriptor, data, offset)
            if self._of(descriptor) is not None:
                self.ops.append(("write", self._of(descriptor), offset, bytes(data[:written])))
            return written

        def write(descriptor: int, data: Any) -> int:
            if self._of(descriptor) is not None:
                self.ops.append(("write", self._of(descriptor), os.lseek(descriptor, 0, os.SEEK_CUR), bytes(data)))
            written: int = real["write"](descriptor, data)
            return written

        def fallocate(descriptor: int, offset: int, num_bytes: int) -> None:
            real["posix_fallocate"](descriptor, offset, num_bytes)
            self.ops.append(("size", self._of(descriptor), offset + num_bytes))

        def fsync(descriptor: int) -> None:
            real["fsync"](descriptor)
            if self._of(descriptor) is not None:
                self.ops.append(("sync", self._of(descriptor)))

        def mkdir(path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
            real["mkdir"](path, mode, dir_fd=dir_fd)
            place = self._place(path, dir_fd)
            if place is not None:
                self.ops.append(("directory", *place, self._new(os.stat(path).st_ino)))

        def rename(source: Any, target: Any) -> None:
            here, there = self._place(source, None), self._place(target, None)
            moved = self._ids.get(os.stat(source).st_ino)
            real["replace"](source, target)
            assert here is not None
            assert there is not None
            assert here[0] == there[0], "the model has renames within one directory only"
            self.ops.append(("rename", here[0], here[1], there[1], moved))

        def removed(name: str) -> Any:
            def remove(path: Any, *, dir_fd: int | None = None) -> None:
                place = self._place(path, dir_fd)
                real[name](path, dir_fd=dir_fd)
                if place is not None:
                    self.ops.append(("remove", *place))

            return remove

        changed = {
            "open": opened,
            "pwrite": pwrite,
            "write": write,
            "posix_fallocate": fallocate,
            "fsync": fsync,
            "mkdir": mkdir,
        }
        changed |= {"rename": rename, "replace": rename, "unlink": removed("unlink"), "rmdir": removed("rmdir")}
        with mock.patch.multiple(os, **changed):
            yield


@dataclass
class _File:
    durable: bytes = b""
    pending: list[Op] = field(default_factory=list)


@dataclass
class _Directory:
    durable: dict[str, int] = field(default_factory=dict)
    pending: list[Op] = field(default_factory=list)


def _apply_to_file(content: bytes, op: Op) -> bytes:
    if op[0] == "size":
        return content.ljust(op[1], b"\0")
    _, offset, data = op
    return content[:offset].ljust(offset, b"\0") + data + content[offset + len(data) :]


def _apply_to_directory(entries: dict[str, int], op: Op) -> None:
    if op[0] == "add":
        entries[op[1]] = op[2]
    elif op[0] == "remove":
        entries.pop(op[1], None)
    else:
        entries.pop(op[1], None)
        entries[op[2]] = op[3]


class Disk:
    """The disk as the calls so far leave it."""

    def __init__(self) -> None:
        self._nodes: dict[int, _File | _Directory] = {0: _Directory()}

    def apply(self, op: Op) -> None:
        """One more recorded call."""
        kind, *rest = op
        if kind in ("file", "directory"):
            parent, name, number = rest
            self._nodes[number] = _File() if kind == "file" else _Directory()
            self._nodes[parent].pending.append(("add", name, number))
        elif kind in ("write", "size") or kind in ("rename", "remove"):
            self._nodes[rest[0]].pending.append((kind, *rest[1:]))
        elif kind == "sync":
            node = self._nodes[rest[0]]
            if isinstance(node, _File):
                for change in node.pending:
                    node.durable = _apply_to_file(node.durable, change)
            else:
                for change in node.pending:
                    _apply_to_directory(node.durable, change)
            node.pending = []

    def after_power_loss(self, rng: random.Random) -> dict[str, bytes | None]:
        """One of the states that may be found: path -> content, None for a directory."""
        found: dict[str, bytes | None] = {}
        self._collect(0, "", rng, found)
        return found

    def _collect(self, number: int, path: str, rng: random.Random, found: dict[str, bytes | None]) -> None:
        node = self._nodes[number]
        assert isinstance(node, _Directory)
        entries = dict(node.durable)
        for change in _survivors(node.pending, rng):
            _apply_to_directory(entries, change)
        for name, child in entries.items():
            here = f"{path}{name}"
            inner = self._nodes[child]
            if isinstance(inner, _Directory):
                found[here] = None
                self._collect(child, f"{here}/", rng, found)
            else:
                content = inner.durable
                for change in _survivors(inner.pending, rng):
                    content = _apply_to_file(content, _torn(change, rng))
                found[here] = content


def _survivors(pending: list[Op], rng: random.Random) -> list[Op]:
    """Which of the changes since the last sync reached the disk: none, all, the first, or any."""
    how = rng.randrange(4)
    if how == 0 or not pending:
        return []
    if how == 1:
        return pending
    if how == 2:
        return pending[: rng.randrange(len(pending) + 1)]
    return [change for change in pending if rng.random() < 0.5]


def _torn(change: Op, rng: random.Random) -> Op:
    if change[0] != "write" or rng.random() < 0.5:
        return change
    kind, offset, data = change
    return kind, offset, data[: SECTOR * rng.randrange(len(data) // SECTOR + 1)]
