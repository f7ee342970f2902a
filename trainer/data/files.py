"""The text files that a path means. No numpy or torch here: the launcher looks before ranks start, the ranks when they read."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path

from anyshard.configs import schema
from anyshard.configs.errors import DataError, Problem
from anyshard.trainer.data.documents import TextReader, check_readable

TEXT_SUFFIXES = (".txt", ".md", ".jsonl")


def check_paths(data: schema.Data) -> None:
    """Refuse, before anything starts, paths that cannot be used; of each .jsonl file one line is read.

    Raises:
        DataError: a path is missing, matches nothing, is empty or cannot be read, or the lines lack the field.
    """
    if data.source == "hf" and data.path is not None:
        check_local("data.path", data.path)
    if data.source != "text":
        return
    for key, path in (("data.path", data.path), ("data.validation_path", data.validation_path)):
        if path is None and key == "data.validation_path":
            continue
        reader = TextReader(key, data.field)
        for file in list_files(key, path)[1]:
            if file.suffix == ".jsonl":
                next(iter(reader.read_file(file)), None)


def is_missing_path(name: str) -> bool:
    """Whether a name that may be one of a hub can only be a path, and nothing is there."""
    looks_like_path = name.startswith((".", "/", "~")) or name.endswith(".json") or name.count("/") > 1
    return looks_like_path and not Path(name).expanduser().exists()


def check_local(key: str, path: str) -> None:
    """Refuse a dataset by path that is not there; a name of a hub passes.

    Raises:
        DataError: there is nothing.
    """
    if is_missing_path(path):
        raise DataError(Problem(key, path, "there is no such file or folder.", f"Paths are relative to {Path.cwd()}."))


def list_files(key: str, path: str | None) -> tuple[Path, list[Path]]:
    """The files of a file name, folder or glob, in a fixed order, and the folder that their names are relative to.

    Raises:
        DataError: there are none, they are empty or cannot be read.
    """
    if path is None:
        raise DataError(
            Problem(key, path, "source text needs it.", "Set it to a file, a folder or a glob such as 'books/*.txt'.")
        )
    base = Path(path).expanduser().absolute()
    if base.is_dir():
        files = sorted(Path(folder, name) for folder, _, names in walk(base) for name in names if name.endswith(TEXT_SUFFIXES))
        root = base
        if not files:
            raise DataError(Problem(key, path, "this folder holds no .txt, .md or .jsonl file.", "Name the files by a glob."))
    elif os.path.lexists(base):
        root, files = base.parent, [base]
    else:
        files = sorted(file for file in map(Path, glob.glob(str(base), recursive=True)) if not file.is_dir())
        if not files:
            reason = "matches no file." if glob.has_magic(path) else "there is no such file or folder."
            fix = "Name a file, a folder or a glob such as 'books/*.txt'"
            fix += "." if base == Path(path) else f"; this one starts at {Path.cwd()}."
            raise DataError(Problem(key, path, reason, fix))
        root = Path(os.path.commonpath([file.parent for file in files]))
    check_readable(key, files)
    if total_bytes(files) == 0:
        what = "this file is empty." if len(files) == 1 else f"all {len(files)} files are empty."
        raise DataError(Problem(key, path, what, "Choose one with text."))
    return root, files


def walk(root: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk` that does not pass over what it cannot read.

    Raises:
        DataError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise DataError(Problem("data.path", error.filename, f"cannot be read ({error.strerror}).", "Make it readable."))

    return os.walk(root, onerror=refuse)


def total_bytes(files: list[Path]) -> int:
    """Size of all files together."""
    return sum(file.stat().st_size for file in files)
