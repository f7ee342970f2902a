"""What a data source hands over, and reading it from text files.

A source is a function `(data: schema.Data, seed: int) -> Documents`, registered under the kind "data". It is called on
every rank and must be cheap there (list files, open an index); `read` is called by the one process that tokenises.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import xxhash

from anyshard.configs.errors import DataError, Problem
from anyshard.trainer.data.cache import fingerprint

MAX_DOCUMENT_BYTES = 4 * 2**20
"""A longer text file is read as several documents, cut at line ends, so that memory stays bounded."""


class Document(NamedTuple):
    """One text, and whether it is kept for validation."""

    text: str
    validation: bool = False


@dataclass(frozen=True)
class Documents:
    """A corpus.

    Args:
        fingerprint: changes whenever `read` would give something else; equal on every rank.
        read: gives the documents, always in the same order; may be called more than once.
        num_bytes: about how much text there is, for progress; None when that is unknown.
        notes: called after `read`: what a person should know about the corpus.
    """

    fingerprint: str
    read: Callable[[], Iterator[Document]]
    num_bytes: int | None = None
    notes: Callable[[], list[str]] = list


def held_out(name: str, fraction: float) -> bool:
    """Whether the document of this name is kept for validation: a property of the name alone, so the split is stable."""
    return xxhash.xxh3_64_intdigest(name.encode()) < fraction * 2**64


def held_out_files(names: list[str], fraction: float) -> set[str]:
    """The names kept for validation: those `held_out` picks, but at least one of them and not all."""
    if fraction <= 0 or len(names) < 2:
        return set()
    ranked = sorted(names, key=lambda name: xxhash.xxh3_64_intdigest(name.encode()))
    count = sum(held_out(name, fraction) for name in names)
    return set(ranked[: min(max(count, 1), len(names) - 1)])


def files_fingerprint(root: Path, files: list[Path]) -> str:
    """Changes with the name, size or time of any of the files; not when the whole folder moves."""
    stats = [(file, file.stat()) for file in files]
    return fingerprint([(file.relative_to(root).as_posix(), s.st_size, s.st_mtime_ns) for file, s in stats])


@dataclass
class TextReader:
    """Reads text files as UTF-8; replaces and counts what is not.

    Args:
        key: the configuration key that gave the path, for errors.
        field_name: the field that holds the text in .jsonl lines.
    """

    key: str
    field_name: str
    _replaced: dict[tuple[Path, int], int] = field(default_factory=dict)

    def notes(self) -> list[str]:
        """What was replaced, in one line."""
        if not self._replaced:
            return []
        first = next(iter(self._replaced))[0]
        num_files = len({path for path, _ in self._replaced})
        where = str(first) if num_files == 1 else f"{num_files} files, the first {first}"
        return [f"{sum(self._replaced.values())} byte sequences are not UTF-8 and were replaced by U+FFFD, in {where}"]

    def read_file(self, path: Path, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, str]]:
        """(number, text) of each document of a file; bytes start to stop of it where given (text only).

        Raises:
            DataError: the file cannot be read or is binary, or a line of a .jsonl file is not an object with the field.
        """
        self._replaced.pop((path, start), None)  # counted again when a file is read again
        try:
            if path.suffix == ".jsonl":
                yield from self._read_jsonl(path)
            else:
                yield from enumerate(self._read_text(path, start, stop if stop is not None else path.stat().st_size))
        except OSError as error:
            raise cannot_read(self.key, path, error.strerror or str(error)) from error

    def _read_text(self, path: Path, start: int, stop: int) -> Iterator[str]:
        origin = start
        with path.open("rb") as file:
            file.seek(start)
            while start < stop:
                block = file.read(min(MAX_DOCUMENT_BYTES, stop - start))
                if not block:
                    return
                if start + len(block) < stop:
                    block += file.readline()
                if b"\0" in block[:4096]:
                    raise DataError(
                        Problem(self.key, path, "is a binary file.", "Give .txt, .md or .jsonl files of UTF-8 text.")
                    )
                start += len(block)
                yield self._decode(block, (path, origin))

    def _read_jsonl(self, path: Path) -> Iterator[tuple[int, str]]:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}:"
                try:
                    record = json.loads(self._decode(line, (path, 0)))
                except ValueError as error:
                    fix = "Every line of a .jsonl file must be one JSON object."
                    raise DataError(Problem(self.key, path, f"{where} not JSON ({error}).", fix)) from error
                text = record.get(self.field_name) if isinstance(record, dict) else None
                if not isinstance(text, str):
                    raise self._no_field(where, record)
                yield number, text

    def _no_field(self, where: str, record: object) -> DataError:
        if not isinstance(record, dict):
            fix = f'Every line must be an object such as {{"{self.field_name}": "..."}}.'
            return DataError(Problem("data.field", self.field_name, f"{where} {type(record).__name__}, not an object.", fix))
        what = "is not a string" if self.field_name in record else "is missing"
        strings = [name for name, value in record.items() if isinstance(value, str)]
        fix = f"Set data.field to one of {', '.join(strings)}." if strings else "Give each line a field that holds the text."
        return DataError(Problem("data.field", self.field_name, f"{where} this field {what}.", fix))

    def _decode(self, block: bytes, where: tuple[Path, int]) -> str:
        try:
            return block.decode("utf-8")
        except UnicodeDecodeError:
            text = block.decode("utf-8", errors="replace")
            count = text.count("\N{REPLACEMENT CHARACTER}") - block.count("\N{REPLACEMENT CHARACTER}".encode())
            self._replaced[where] = self._replaced.get(where, 0) + count
            return text


def cannot_read(key: str, path: Path, reason: str) -> DataError:
    """The error for a file that is there but cannot be read."""
    return DataError(Problem(key, path, f"cannot be read ({reason}).", "Make it readable, or choose another path."))


def check_readable(key: str, files: list[Path]) -> None:
    """Refuse, before any work is done, files that cannot be opened.

    Raises:
        DataError: naming the first of them.
    """
    for file in files:
        if not file.is_file():
            raise cannot_read(key, file, "a dangling link" if file.is_symlink() else "not a regular file")
        if not os.access(file, os.R_OK):
            raise cannot_read(key, file, "permission denied")
