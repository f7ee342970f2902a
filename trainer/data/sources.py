"""The data sources of our own; each is registered in `configs/registry.py` under its name.

`source(data: schema.Data, seed: int) -> Documents`. A plugin writes the same function: see docs/data.md.
"""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from anyshard.configs import schema
from anyshard.configs.errors import DataError, Problem
from anyshard.trainer.data.cache import fingerprint
from anyshard.trainer.data.documents import (
    Document,
    Documents,
    TextReader,
    files_fingerprint,
    held_out,
    held_out_files,
)
from anyshard.trainer.data.files import list_files, total_bytes, walk
from anyshard.trainer.data.hub import hf
from anyshard.trainer.data.order import mix64

__all__ = ["hf", "python_stdlib", "synthetic", "text"]

_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def python_stdlib(data: schema.Data, seed: int) -> Documents:
    """The standard library's sources of the running interpreter, without tests: one document a file.

    Raises:
        DataError: a path is set, or this Python comes without its sources.
    """
    _refuse_paths(data)
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        Path(folder, name)
        for folder, subfolders, names in walk(root)
        for name in names
        if name.endswith(".py") and not _NOT_LIBRARY.intersection(Path(folder).relative_to(root).parts)
    )
    if not files:
        fix = "Use another Python, or data=text with data.path."
        raise DataError(Problem("data.source", data.source, f"{root} holds no .py files.", fix))
    # the version counts, not the files' times: another machine with the same Python shares the fingerprint
    sizes = [(file.relative_to(root).as_posix(), file.stat().st_size) for file in files]
    identity = fingerprint("python_stdlib", sys.version, sizes, data.validation_fraction)
    return _whole_files(data, "data.source", root, files, identity)


def text(data: schema.Data, seed: int) -> Documents:
    """Text files: a .jsonl file holds one document a line, any other one document.

    Raises:
        DataError: a path is missing, matches nothing, is empty or cannot be read.
    """
    root, files = list_files("data.path", data.path)
    if data.validation_path is not None:
        return _two_paths(data, root, files)
    identity = fingerprint("text", files_fingerprint(root, files), data.field, data.validation_fraction)
    if not any(file.suffix == ".jsonl" for file in files):
        return _whole_files(data, "data.path", root, files, identity)
    reader = TextReader("data.path", data.field)

    def read() -> Iterator[Document]:
        for file in files:
            name = file.relative_to(root).as_posix()
            for number, content in reader.read_file(file):
                kept = held_out(f"{name}:{number}" if file.suffix == ".jsonl" else name, data.validation_fraction)
                yield Document(content, kept)

    return Documents(identity, read, total_bytes(files), reader.notes)


def synthetic(data: schema.Data, seed: int) -> Documents:
    """Text of a random Markov chain over 64 letters: deterministic in the seed, learnable, needs no files.

    With data.tokenizer=bytes it makes data.num_samples samples exactly. Each letter has seven successors, of which one
    comes half of the time: a model that learns them goes from 4.2 nats a letter (all are equally frequent) to 1.5.

    Raises:
        DataError: a path is set.
    """
    _refuse_paths(data)
    num_train = data.num_samples * data.sequence_length + 1
    num_held_out = round(data.num_samples * data.validation_fraction)
    num_validation = num_held_out * data.sequence_length + 1 if num_held_out else 0

    def read() -> Iterator[Document]:
        yield from (Document(part, True) for part in _markov_documents(seed, 1, num_validation))
        yield from (Document(part) for part in _markov_documents(seed, 0, num_train))

    identity = fingerprint("synthetic-1", seed, num_train, num_validation)
    return Documents(identity, read, num_train + num_validation)


def _markov_documents(seed: int, stream: int, num_tokens: int) -> Iterator[str]:
    """Documents of 63 to 510 letters that make `num_tokens` tokens, with one end-of-text after each."""
    letters = np.frombuffer(b" ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789.", dtype=np.uint8)
    slots = np.array([0] * 8 + [1] * 3 + [2, 3, 4, 5, 6])  # one successor half of the time, a tail of five
    key = mix64(np.array([seed % 2**64], dtype=np.uint64))
    # seven random permutations: every letter is as frequent as any other, so the letters alone tell nothing
    successors = np.argsort(mix64(key + np.arange(64 * 7).astype(np.uint64)).reshape(64, 7), axis=0, kind="stable")
    noise_key = mix64(key + np.uint64(1 + stream))
    done, batch, longest = 0, 256, 510
    for block in range(sys.maxsize):
        count = np.arange(block * batch, (block + 1) * batch, dtype=np.uint64)
        state = (mix64(noise_key ^ count) % np.uint64(64)).astype(np.int64)
        lengths = 63 + (mix64(~noise_key ^ count) % np.uint64(longest - 62)).astype(np.int64)
        noise = mix64(noise_key + (count[:, None] << np.uint64(16)) + np.arange(1, longest + 1, dtype=np.uint64))
        steps = slots[(noise % np.uint64(16)).astype(np.int64)]
        states = np.empty((batch, longest), dtype=np.int64)
        for position in range(longest):
            states[:, position] = state = successors[state, steps[:, position]]
        for row, length in zip(letters[states], lengths.tolist(), strict=True):
            if done >= num_tokens:
                return
            length = min(length, num_tokens - done - 1)
            done += length + 1
            yield row[:length].tobytes().decode("ascii")


def _whole_files(data: schema.Data, key: str, root: Path, files: list[Path], identity: str) -> Documents:
    """One document a file, split by file; a single file is split by giving its end to validation."""
    reader = TextReader(key, data.field)
    held = held_out_files([file.relative_to(root).as_posix() for file in files], data.validation_fraction)

    def read() -> Iterator[Document]:
        if len(files) == 1:
            cut = _line_end(files[0], 1 - data.validation_fraction)
            yield from (Document(content, True) for _, content in reader.read_file(files[0], start=cut))
            yield from (Document(content) for _, content in reader.read_file(files[0], stop=cut))
            return
        for file in files:
            kept = file.relative_to(root).as_posix() in held
            yield from (Document(content, kept) for _, content in reader.read_file(file))

    return Documents(identity, read, total_bytes(files), reader.notes)


def _two_paths(data: schema.Data, root: Path, files: list[Path]) -> Documents:
    """Training documents from data.path and validation documents from data.validation_path, which come first."""
    other_root, other_files = list_files("data.validation_path", data.validation_path)
    train, validation = TextReader("data.path", data.field), TextReader("data.validation_path", data.field)

    def read() -> Iterator[Document]:
        for file in other_files:
            yield from (Document(content, True) for _, content in validation.read_file(file))
        for file in files:
            yield from (Document(content) for _, content in train.read_file(file))

    prints = files_fingerprint(root, files), files_fingerprint(other_root, other_files)
    identity = fingerprint("text", *prints, data.field)
    return Documents(identity, read, total_bytes(files) + total_bytes(other_files), lambda: train.notes() + validation.notes())


def _line_end(file: Path, share: float) -> int:
    """Offset of the first line that starts at or after this share of the file."""
    size = file.stat().st_size
    if share >= 1:
        return size
    with file.open("rb") as stream:
        stream.seek(max(int(size * share) - 1, 0))
        stream.readline()
        return stream.tell()


def _refuse_paths(data: schema.Data) -> None:
    for name in ("path", "validation_path"):
        if getattr(data, name) is not None:
            reason = f"source {data.source} reads no files of yours."
            raise DataError(Problem(f"data.{name}", getattr(data, name), reason, "Use data=text or data=hf, or leave it out."))
