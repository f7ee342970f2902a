"""Checkpoints on disk: which there are, which are sound, what is damaged (pure: no torch; used by `launch/ckpt.py` too)."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from anyshard.configs.errors import CheckpointError
from anyshard.configs.frozen import checkpoint_dir_in
from anyshard.configs.places import is_remote
from anyshard.trainer.checkpoint.boxes import share
from anyshard.trainer.checkpoint.manifest import (
    COMMIT,
    Chunk,
    Commit,
    Manifest,
    Tensor,
    check_coverage,
    digest,
    parse_commit,
    parse_manifest,
)

_NAME = re.compile(r"step-(\d{8,})")
MAX_MANIFEST_BYTES = 2**30
PADDING_BLOCK_BYTES = 2**20


@dataclass(frozen=True)
class Damage:
    """One defect of a checkpoint: in which file, at which bytes, of which tensor."""

    file: str
    what: str
    offset: int | None = None
    nbytes: int | None = None
    tensor: str | None = None

    def __str__(self) -> str:
        place = f", bytes {self.offset}..{self.offset + (self.nbytes or 0)}" if self.offset is not None else ""
        return f"{self.file}{place}{f', {self.tensor}' if self.tensor else ''}: {self.what}"


@dataclass(frozen=True)
class Found:
    """A directory that looks like a checkpoint; `problem` says why it is not a sound one (contents are not read)."""

    path: Path
    step: int
    problem: str | None


def checkpoint_name(step: int) -> str:
    """Directory name of the checkpoint of a step."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """The step in a directory's name, None when it is not the name of a checkpoint."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def read_commit(path: Path) -> Commit:
    """COMMIT of the checkpoint directory `path`.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    return parse_commit(_read(path / COMMIT, None), str(path / COMMIT))


def read_manifests(path: Path, commit: Commit) -> list[Manifest]:
    """All manifests of a checkpoint, each checked against COMMIT.

    Raises:
        CheckpointError: one is missing, damaged or cannot be.
    """
    # a million small objects that all stay: looking for garbage among them again and again takes longer than making them
    collecting = gc.isenabled()
    gc.disable()
    try:
        return [_read_manifest(path, commit, rank) for rank in range(commit.world_size)]
    finally:
        if collecting:
            gc.enable()


def _read_manifest(path: Path, commit: Commit, rank: int) -> Manifest:
    ref = commit.manifests[rank]
    data = _read(path / ref.file, ref.nbytes)
    if digest(data) != ref.digest:
        raise CheckpointError(f"{path / ref.file}: its checksum is not the one in COMMIT: the file is damaged.")
    return parse_manifest(data, str(path / ref.file), rank)


def _read(path: Path, nbytes: int | None) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_MANIFEST_BYTES or (nbytes is not None and size != nbytes):
            expected = f"at most {MAX_MANIFEST_BYTES}" if nbytes is None else str(nbytes)
            raise CheckpointError(f"{path}: it has {size} bytes, {expected} were expected.")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}).") from error


def index_chunks(manifests: list[Manifest]) -> dict[tuple[str, str], list[Chunk]]:
    """Chunks of all ranks by (name, key), in row-major order.

    Raises:
        CheckpointError: ranks disagree about a tensor, or its chunks do not cover it exactly once.
    """
    found: dict[tuple[str, str], list[Chunk]] = {}
    for manifest in manifests:
        for chunk in manifest.chunks:
            found.setdefault((chunk.tensor.name, chunk.tensor.key), []).append(chunk)
    for (name, key), chunks in found.items():
        tensors: set[Tensor] = {chunk.tensor for chunk in chunks}
        if len(tensors) > 1:
            raise CheckpointError(f"{name} [{key}]: the ranks disagree about its shape or dtype: {sorted(tensors)}.")
        if defect := check_coverage(chunks[0].tensor, chunks):
            raise CheckpointError(f"{name} [{key}]: {defect}.")
        chunks.sort(key=lambda chunk: (chunk.box, chunk.start))
    return found


def _exists(path: Path) -> bool:
    """Whether a checkpoint is there. In an object store COMMIT makes it one; a directory has its name when it is whole."""
    return (path / COMMIT).is_file() if is_remote(path) else path.is_dir()


def open_bytes(path: Path) -> IO[bytes]:
    """A file of a checkpoint, to read the parts that are asked for and nothing ahead of them."""
    if not is_remote(path):
        return path.open("rb", buffering=0)
    remote: Any = path
    opened: IO[bytes] = remote.fs.open(str(path), "rb", cache_type="none")
    return opened


def structure_problem(path: Path) -> str | None:
    """Why `path` cannot be a whole checkpoint, from COMMIT, manifests and file sizes; None when it can."""
    damages = _structure(path)[1]
    return str(damages[0]) if damages else None


def _structure(path: Path) -> tuple[list[Manifest], list[Damage]]:
    """Everything but the data: the sound manifests, and what is wrong."""
    try:
        commit = read_commit(path)
    except CheckpointError as error:
        return [], [Damage(COMMIT, str(error))]
    manifests, damages = [], []
    if step_of(path) not in (None, commit.step):
        damages.append(Damage(COMMIT, f"it is of step {commit.step}, the directory is {path.name}"))
    for rank, ref in enumerate(commit.manifests):
        try:
            manifest = _read_manifest(path, commit, rank)
        except CheckpointError as error:
            damages.append(Damage(ref.file, str(error)))
            continue
        manifests.append(manifest)
        data = path / manifest.file
        size = data.stat().st_size if data.is_file() else None
        if size != manifest.num_bytes:
            state = "it is missing" if size is None else f"it has {size} bytes"
            damages.append(Damage(manifest.file, f"{state}, {manifest.num_bytes} bytes were written"))
    if not damages:
        try:
            index_chunks(manifests)
        except CheckpointError as error:
            damages.append(Damage(COMMIT, str(error)))
    return manifests, damages


def verify(
    path: Path, progress: Callable[[int, int], None] | None = None, *, rank: int = 0, world_size: int = 1, data: bool = True
) -> list[Damage]:
    """Check a checkpoint: every byte of every file against the checksums, and that each tensor is whole.

    Args:
        progress: called with (bytes checked, bytes to check).
        rank: of those that share the work; each checks every manifest and its own part of the data.
        data: False checks only COMMIT, manifests and file sizes.

    Returns:
        What is damaged; empty when nothing is.
    """
    manifests, damages = _structure(path)
    if not data:
        return damages
    # A work item is a chunk and the padding before the next one.
    items = [(manifest, number) for manifest in manifests for number in range(len(manifest.chunks))]
    for manifest in manifests:
        manifest.chunks.sort(key=lambda chunk: chunk.offset)
    sizes = [manifest.chunks[number].nbytes for manifest, number in items]
    # whole chunks: an item belongs to the rank that holds its first byte
    mine = [index for index, start, _ in share(sizes, rank, world_size) if start == 0]
    total, done = sum(sizes[index] for index in mine), 0
    for index in mine:
        manifest, number = items[index]
        damages += _verify_chunk(path, manifest, number)
        done += sizes[index]
        if progress:
            progress(done, total)
    return damages


def _verify_chunk(path: Path, manifest: Manifest, number: int) -> list[Damage]:
    chunk = manifest.chunks[number]
    end = manifest.chunks[number + 1].offset if number + 1 < len(manifest.chunks) else manifest.num_bytes
    label = f"{chunk.tensor.name} [{chunk.tensor.key}]"
    try:
        with open_bytes(path / manifest.file) as file:
            file.seek(chunk.offset)
            content = file.read(chunk.nbytes)
            if len(content) < chunk.nbytes:
                return [Damage(chunk.file, "the file ends early", chunk.offset, chunk.nbytes, label)]
            if digest(content) != chunk.digest:
                return [Damage(chunk.file, "checksum mismatch", chunk.offset, chunk.nbytes, label)]
            while padding := file.read(min(PADDING_BLOCK_BYTES, end - file.tell())):
                if padding.strip(b"\0"):
                    start = chunk.offset + chunk.nbytes
                    return [Damage(chunk.file, "the padding is not zero", start, end - start, label)]
    except OSError as error:
        return [Damage(chunk.file, f"cannot be read ({error.strerror})", chunk.offset, chunk.nbytes, label)]
    return []


def list_checkpoints(directory: Path) -> list[Found]:
    """The checkpoints in a directory, newest first; temporary ones are not among them."""
    if not directory.is_dir():
        return []
    found = [(step, path) for path in directory.iterdir() if (step := step_of(path)) is not None and _exists(path)]
    return [Found(path, step, structure_problem(path)) for step, path in sorted(found, reverse=True)]


def resolve(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest sound one of a run or of a directory of checkpoints.

    Raises:
        CheckpointError: there is none.
    """
    if (path / COMMIT).exists() or step_of(path) is not None:
        if not _exists(path):
            raise CheckpointError(f"{path}: there is no such checkpoint.")
        return path
    for directory in (path, path / "checkpoints" if is_remote(path) else checkpoint_dir_in(path)):
        for found in list_checkpoints(directory):
            if found.problem is None:
                return found.path
    raise CheckpointError(f"{path}: there is no checkpoint here: give a run directory or a step-XXXXXXXX directory.")
