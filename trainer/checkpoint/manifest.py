"""The checkpoint format: what COMMIT and the rank manifests hold, written and read with every field checked (pure: no torch).

Layout of one checkpoint (docs/checkpoint-format.md has the details):

    step-00000100/COMMIT            JSON, then a line with its own xxh3-128: exists last, and makes the rest a checkpoint
    step-00000100/rank-00000.json   manifest of rank 0: the chunks in its data file
    step-00000100/rank-00000.bin    raw little-endian elements, each chunk at a multiple of 4 KiB

Nothing is unpickled. A manifest is not trusted: names, sizes and ranges are checked before anything is allocated or opened.
Finding and verifying checkpoints on disk is in `catalog.py`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard, TypeVar

import xxhash

from anyshard.configs.errors import CheckpointError
from anyshard.trainer.checkpoint.boxes import Box, box_numel, full_box, uncovered

FORMAT = "anyshard-checkpoint"
VERSION = 1
COMMIT = "COMMIT"
ALIGN_BYTES = 4096  # of O_DIRECT on every common file system
MAX_CHUNK_BYTES = 64 * 2**20  # a reader holds one chunk in memory, so a manifest may not ask for more
MAX_NUMEL = 2**48
MAX_DIMS = 32
MAX_NAME_CHARS = 1024
_DIGEST = re.compile(r"[0-9a-f]{32}")

ITEM_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1, "bool": 1,
    "complex64": 8, "complex128": 16,
}  # fmt: skip
SCALAR_KINDS = frozenset(ITEM_BYTES) | {"int", "float"}
"""A scalar state is a tensor of no dims and one of these dtypes, or a plain Python number ("int", "float")."""

PARAM = "param"
"""State key of the value of a parameter, at the highest precision at which the run holds it."""
BUFFER = "buffer"
"""State key of a persistent buffer."""


@dataclass(frozen=True, order=True)
class Tensor:
    """A global tensor: `name` is canonical, `key` says which state of it ("param", "exp_avg", "buffer", ...)."""

    name: str
    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Chunk:
    """`numel` elements from `start` of the row-major elements of `box` of a tensor, at `offset` of a data file."""

    tensor: Tensor
    box: Box
    start: int
    numel: int
    file: str
    offset: int
    nbytes: int
    digest: str


@dataclass(frozen=True)
class Scalar:
    """A scalar state, such as `step`, of the parameters `names`."""

    key: str
    kind: str
    value: float
    names: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """What one rank wrote."""

    rank: int
    file: str
    num_bytes: int
    chunks: list[Chunk]
    scalars: list[Scalar]
    meta: dict[str, Any]


@dataclass(frozen=True)
class FileRef:
    """A manifest as COMMIT names it."""

    file: str
    nbytes: int
    digest: str


@dataclass(frozen=True)
class Commit:
    """The record that makes a checkpoint exist.

    Attributes:
        layout: dp, tp, pp, sp, zero stage, offload, world size of the run that wrote it; nothing depends on it.
        engine: counters and the loss scaler.
        optimizer: `kind`, and `groups` with every hyper-parameter by group name.
        tied: other names of canonical tensors.
        meta: whatever the caller stored.
    """

    step: int
    created: str
    layout: dict[str, Any]
    versions: dict[str, Any]
    engine: dict[str, Any]
    optimizer: dict[str, Any]
    tied: dict[str, str]
    meta: dict[str, Any]
    manifests: list[FileRef] = field(default_factory=list)

    @property
    def world_size(self) -> int:
        """Number of ranks that wrote."""
        return len(self.manifests)

    @property
    def root(self) -> str:
        """Merkle root of the manifests."""
        return merkle_root([ref.digest for ref in self.manifests])


def digest(data: bytes | bytearray | memoryview) -> str:
    """xxh3-128, as 32 hexadecimal digits. Finds damage; it is no defence against a forger."""
    return xxhash.xxh3_128_hexdigest(data)


def merkle_root(digests: Sequence[str]) -> str:
    """Root of the binary tree over the digests in rank order; an odd last node moves up unchanged."""
    level = [digest(b"\0" + bytes.fromhex(leaf)) for leaf in digests]
    while len(level) > 1:
        pairs = [digest(b"\1" + bytes.fromhex(a + b)) for a, b in zip(level[::2], level[1::2], strict=False)]
        level = pairs + ([level[-1]] if len(level) % 2 else [])
    return level[0] if level else digest(b"")


def data_name(rank: int) -> str:
    """Name of the data file of a rank."""
    return f"rank-{rank:05d}.bin"


def manifest_name(rank: int) -> str:
    """Name of the manifest of a rank."""
    return f"rank-{rank:05d}.json"


def dump_manifest(manifest: Manifest) -> bytes:
    """The manifest as JSON.

    A chunk is a row `[tensor, box or null, start, numel, offset, nbytes, digest]`, a scalar `[key, kind, value, names]` with
    null for the names of all parameters of this manifest that have a tensor state.
    """
    tensors = list(dict.fromkeys(chunk.tensor for chunk in manifest.chunks))
    stepped = set(_stepped(tensors))
    number = {tensor: index for index, tensor in enumerate(tensors)}
    rows = [
        [number[c.tensor], None if c.box == full_box(c.tensor.shape) else c.box, c.start, c.numel, c.offset, c.nbytes, c.digest]
        for c in manifest.chunks
    ]
    return _dump(
        {
            "format": FORMAT,
            "version": VERSION,
            "rank": manifest.rank,
            "file": manifest.file,
            "nbytes": manifest.num_bytes,
            "tensors": [[t.name, t.key, t.dtype, t.shape] for t in tensors],
            "chunks": rows,
            "scalars": [[s.key, s.kind, s.value, None if set(s.names) == stepped else s.names] for s in manifest.scalars],
            "meta": manifest.meta,
        }
    )


def _stepped(tensors: Iterable[Tensor]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(tensor.name for tensor in tensors if tensor.key not in (PARAM, BUFFER)))


def dump_commit(commit: Commit) -> bytes:
    """COMMIT as JSON and, on the last line, the digest of that JSON."""
    body = _dump(
        {
            "format": FORMAT,
            "version": VERSION,
            "step": commit.step,
            "created": commit.created,
            "root": commit.root,
            "layout": commit.layout,
            "versions": commit.versions,
            "engine": commit.engine,
            "optimizer": commit.optimizer,
            "tied": commit.tied,
            "meta": commit.meta,
            "manifests": [[ref.file, ref.nbytes, ref.digest] for ref in commit.manifests],
        }
    )
    return body + b"\n" + digest(body).encode() + b"\n"


def _dump(content: dict[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()


def parse_commit(data: bytes, where: str) -> Commit:
    """Read and check COMMIT.

    Raises:
        CheckpointError: it is damaged, of a newer version, or not what a COMMIT holds.
    """
    body, _, trailer = data.removesuffix(b"\n").rpartition(b"\n")
    if not data.endswith(b"\n") or trailer != digest(body).encode():
        raise CheckpointError(f"{where}: its checksum does not fit its content: the file is damaged or incomplete.")
    fields = _Fields(_load(body, where), where)
    fields.check_version()
    refs = [_parse_ref(row, rank, where) for rank, row in enumerate(fields.get("manifests", list))]
    commit = Commit(
        step=fields.integer("step", 2**53),
        created=fields.get("created", str),
        layout=fields.get("layout", dict),
        versions=fields.get("versions", dict),
        engine=fields.get("engine", dict),
        optimizer=fields.get("optimizer", dict),
        tied=fields.get("tied", dict),
        meta=fields.get("meta", dict),
        manifests=refs,
    )
    if not refs or fields.get("root", str) != commit.root:
        raise CheckpointError(f"{where}: the Merkle root does not fit the list of manifests.")
    counters, optimizer = _Fields(commit.engine, where), _Fields(commit.optimizer, where)
    for key in ("global_steps", "skipped_steps", "optimizer_steps"):
        counters.integer(key, 2**53)
    for key, kind in (("class", str), ("kind", str), ("groups", dict)):
        optimizer.get(key, kind)
    return commit


def _parse_ref(row: Any, rank: int, where: str) -> FileRef:
    fields = _Fields(_row(row, ("file", "nbytes", "digest"), where), where)
    ref = FileRef(fields.get("file", str), fields.integer("nbytes", 2**40), fields.digest("digest"))
    if ref.file != manifest_name(rank):
        raise CheckpointError(f"{where}: manifest {rank} is called {ref.file!r}, not {manifest_name(rank)!r}.")
    return ref


def parse_manifest(data: bytes, where: str, rank: int) -> Manifest:
    """Read and check the manifest of a rank.

    Raises:
        CheckpointError: it is not the manifest of that rank, or something in it cannot be.
    """
    fields = _Fields(_load(data, where), where)
    fields.check_version()
    if fields.integer("rank", 2**31) != rank or fields.get("file", str) != data_name(rank):
        raise CheckpointError(f"{where}: this is not the manifest of rank {rank} with the data file {data_name(rank)}.")
    num_bytes = fields.integer("nbytes", 2**62)
    tensors = [_parse_tensor(row, where) for row in fields.get("tensors", list)]
    boxes = _Boxes(tensors, where)
    chunks = [_parse_chunk(row, boxes, data_name(rank), where) for row in fields.get("chunks", list)]
    end = 0
    for chunk in sorted(chunks, key=lambda chunk: chunk.offset):
        if chunk.offset < end:
            raise CheckpointError(f"{where}: two chunks overlap at offset {chunk.offset} of {chunk.file}.")
        end = chunk.offset + chunk.nbytes
    if end > num_bytes:
        raise CheckpointError(f"{where}: chunks end at byte {end}, but {data_name(rank)} has {num_bytes}.")
    scalars = [_parse_scalar(row, _stepped(tensors), where) for row in fields.get("scalars", list)]
    return Manifest(rank, data_name(rank), num_bytes, chunks, scalars, fields.get("meta", dict))


def _parse_tensor(row: Any, where: str) -> Tensor:
    fields = _Fields(_row(row, ("name", "key", "dtype", "shape"), where), where)
    shape = tuple(fields.get("shape", list))
    dtype = fields.get("dtype", str)
    sound = len(shape) <= MAX_DIMS and all(_is_count(size) for size in shape)
    if not sound or math.prod(shape) > MAX_NUMEL or dtype not in ITEM_BYTES:
        raise CheckpointError(f"{where}: a tensor of shape {_short(shape)} and dtype {_short(dtype)} cannot be.")
    return Tensor(fields.name("name"), fields.name("key"), dtype, shape)


class _Boxes:
    """The boxes of the tensors of a manifest, each checked once: a shard has as many chunks as it has pieces of 16 MiB."""

    def __init__(self, tensors: list[Tensor], where: str) -> None:
        self.tensors, self._where = tensors, where
        self._last: tuple[int, Any, Box] | None = None

    def of(self, number: int, row: Any) -> Box:
        if self._last is None or self._last[:2] != (number, row):
            tensor = self.tensors[number]
            self._last = (number, row, full_box(tensor.shape) if row is None else _parse_box(row, tensor, self._where))
        return self._last[2]


def _parse_chunk(row: Any, boxes: _Boxes, file: str, where: str) -> Chunk:
    row = _row(row, ("tensor", "box", "start", "numel", "offset", "nbytes", "digest"), where)
    fields = _Fields(row, where)
    number = fields.integer("tensor", 2**31)
    if number >= len(boxes.tensors):
        raise CheckpointError(f"{where}: a chunk names tensor {number} of {len(boxes.tensors)}.")
    tensor, box = boxes.tensors[number], boxes.of(number, row["box"])
    chunk = Chunk(
        tensor,
        box,
        fields.integer("start", MAX_NUMEL),
        fields.integer("numel", MAX_NUMEL),
        file,
        fields.integer("offset", 2**62),
        fields.integer("nbytes", MAX_CHUNK_BYTES),
        fields.digest("digest"),
    )
    inside = chunk.numel > 0 and chunk.start + chunk.numel <= box_numel(box)
    if not inside or chunk.nbytes != chunk.numel * ITEM_BYTES[tensor.dtype] or chunk.offset % ALIGN_BYTES:
        raise CheckpointError(
            f"{where}: the chunk of {tensor.name} [{tensor.key}] at offset {chunk.offset} is inconsistent: elements "
            f"{chunk.start}..{chunk.start + chunk.numel} of a box of {box_numel(box)}, {chunk.nbytes} bytes of {tensor.dtype}."
        )
    return chunk


def _parse_box(box: Any, tensor: Tensor, where: str) -> Box:
    sound = isinstance(box, list) and len(box) == len(tensor.shape)
    sound = sound and all(isinstance(dim, list) and len(dim) == 2 and all(map(_is_count, dim)) for dim in box)
    if not sound or not all(start < stop <= size for (start, stop), size in zip(box, tensor.shape, strict=True)):
        raise CheckpointError(f"{where}: {_short(box)} is not a box of {tensor.name} with shape {tensor.shape}.")
    return tuple((start, stop) for start, stop in box)


def _parse_scalar(row: Any, stepped: tuple[str, ...], where: str) -> Scalar:
    row = _row(row, ("key", "kind", "value", "names"), where)
    fields = _Fields(row, where)
    kind, value = fields.get("kind", str), row["value"]
    names = stepped if row["names"] is None else fields.get("names", list)
    if kind not in SCALAR_KINDS or not isinstance(value, int | float) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{where}: the scalar {_short(row['key'])}={_short(value)} of kind {_short(kind)} cannot be.")
    return Scalar(fields.name("key"), kind, value, tuple(names))


def check_coverage(tensor: Tensor, chunks: Iterable[Chunk]) -> str | None:
    """Why the chunks do not cover the tensor exactly once, or None when they do."""
    by_box: dict[Box, list[tuple[int, int]]] = {}
    for chunk in chunks:
        by_box.setdefault(chunk.box, []).append((chunk.start, chunk.numel))
    for box, pieces in by_box.items():
        if defect := uncovered(pieces, box_numel(box)):
            start, stop, kind = defect
            return f"elements {start}..{stop} are {'stored twice' if kind == 'twice' else kind}"
        for other in by_box:
            if other is not box and all(max(a, c) < min(b, d) for (a, b), (c, d) in zip(box, other, strict=True)):
                return f"the boxes {box} and {other} overlap"
    stored = sum(box_numel(box) for box in by_box)
    return None if stored == tensor.numel else f"{stored} of {tensor.numel} elements are stored"


T = TypeVar("T")


@dataclass(frozen=True)
class _Fields:
    """Checked access to a JSON object; `where` is the file, for errors."""

    content: Mapping[str, Any]
    where: str

    def get(self, key: str, kind: type[T]) -> T:
        value = self.content.get(key)
        if type(value) is not kind:
            raise CheckpointError(f"{self.where}: {key}={_short(value)} is not a {kind.__name__}.")
        return value

    def integer(self, key: str, largest: int) -> int:
        value = self.content.get(key)
        if not _is_count(value) or value > largest:
            raise CheckpointError(f"{self.where}: {key}={_short(value)} is not an integer from 0 to {largest}.")
        return value

    def name(self, key: str) -> str:
        value = self.get(key, str)
        if not value or len(value) > MAX_NAME_CHARS or not value.isprintable():
            raise CheckpointError(f"{self.where}: {key}={_short(value)} is not a name.")
        return value

    def digest(self, key: str) -> str:
        value = self.get(key, str)
        if not _DIGEST.fullmatch(value):
            raise CheckpointError(f"{self.where}: {key}={_short(value)} is not an xxh3-128 digest.")
        return value

    def check_version(self) -> None:
        version = self.content.get("version")
        if self.content.get("format") != FORMAT or type(version) is not int:
            raise CheckpointError(f"{self.where}: this is not a file of the format {FORMAT!r}.")
        if not 1 <= version <= VERSION:
            raise CheckpointError(
                f"{self.where}: format version {version} is unknown here (up to {VERSION}): use a newer anyshard."
            )


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and value >= 0


def _load(data: bytes, where: str) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{where}: not a JSON object.")
    return content


def _row(row: Any, names: tuple[str, ...], where: str) -> dict[str, Any]:
    if not isinstance(row, list) or len(row) != len(names):
        raise CheckpointError(f"{where}: {_short(row)} is not a row of ({', '.join(names)}).")
    return dict(zip(names, row, strict=True))


def _short(value: object, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
