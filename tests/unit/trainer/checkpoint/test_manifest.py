"""The format: round trips, and everything a hostile or damaged manifest may try."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from helpers.checkpoints import a_commit, some_values, write_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from anyshard.configs.errors import CheckpointError
from anyshard.trainer.checkpoint.manifest import (
    MAX_CHUNK_BYTES,
    Chunk,
    FileRef,
    Manifest,
    Scalar,
    Tensor,
    check_coverage,
    digest,
    dump_commit,
    dump_manifest,
    merkle_root,
    parse_commit,
    parse_manifest,
)

TENSOR = Tensor("a.weight", "exp_avg", "float32", (4, 6))
CHUNK = Chunk(TENSOR, ((0, 4), (0, 6)), 6, 18, "rank-00001.bin", 4096, 72, digest(b""))
MANIFEST = Manifest(1, "rank-00001.bin", 8192, [CHUNK], [Scalar("step", "float32", 3.0, ("a.weight",))], {"rng": [1]})
REFS = [FileRef("rank-00000.json", 10, digest(b"0")), FileRef("rank-00001.json", 11, digest(b"1"))]


def test_manifest_round_trip() -> None:
    assert parse_manifest(dump_manifest(MANIFEST), "here", 1) == MANIFEST


def test_a_box_survives() -> None:
    chunk = Chunk(TENSOR, ((1, 3), (0, 6)), 2, 10, "rank-00001.bin", 0, 40, digest(b""))
    manifest = Manifest(1, "rank-00001.bin", 4096, [chunk], [], {})
    assert parse_manifest(dump_manifest(manifest), "here", 1) == manifest


def test_scalars_name_the_parameters_that_are_not_all() -> None:
    other = Chunk(Tensor("b", "exp_avg", "float32", (1,)), ((0, 1),), 0, 1, "rank-00001.bin", 0, 4, digest(b""))
    manifest = Manifest(1, "rank-00001.bin", 8192, [other, CHUNK], [Scalar("step", "int", 3, ("b",))], {})
    assert parse_manifest(dump_manifest(manifest), "here", 1) == manifest


def test_commit_round_trip() -> None:
    commit = a_commit(manifests=REFS)
    assert parse_commit(dump_commit(commit), "here") == commit


@pytest.mark.parametrize("num_leaves", [1, 2, 3, 4, 5, 8])
def test_merkle_root_depends_on_every_leaf_and_their_order(num_leaves: int) -> None:
    leaves = [digest(bytes([number])) for number in range(num_leaves)]
    roots = {merkle_root(leaves), merkle_root([*leaves, digest(b"more")])}
    for number in range(num_leaves):
        roots.add(merkle_root([*leaves[:number], digest(b"other"), *leaves[number + 1 :]]))
    assert len(roots) == num_leaves + 2
    assert num_leaves == 1 or merkle_root(leaves[::-1]) not in roots


def test_every_bit_of_commit_is_checked() -> None:
    data = dump_commit(a_commit(manifests=REFS))
    for position in range(len(data)):
        for bit in range(8):
            broken = bytearray(data)
            broken[position] ^= 1 << bit
            with pytest.raises(CheckpointError):
                parse_commit(bytes(broken), "here")


def test_every_truncation_of_commit_is_found() -> None:
    data = dump_commit(a_commit(manifests=REFS))
    for length in range(len(data)):
        with pytest.raises(CheckpointError, match="checksum"):
            parse_commit(data[:length], "here")


def edited(change: Any) -> bytes:
    content = json.loads(dump_manifest(MANIFEST))
    change(content)
    return json.dumps(content).encode()


def set_in(*path: Any) -> Any:
    *keys, last, value = path

    def change(content: Any) -> None:
        for key in keys:
            content = content[key]
        content[last] = value

    return change


HOSTILE = {
    "not JSON": lambda: b"{",
    "deeply nested": lambda: b"[" * 100_000,
    "not an object": lambda: b"[1]",
    "other format": lambda: edited(set_in("format", "torch")),
    "newer version": lambda: edited(set_in("version", 2)),
    "version that is no number": lambda: edited(set_in("version", "1")),
    "path traversal": lambda: edited(set_in("file", "../../etc/passwd")),
    "absolute path": lambda: edited(set_in("file", "/etc/passwd")),
    "file of another rank": lambda: edited(set_in("file", "rank-00002.bin")),
    "another rank": lambda: edited(set_in("rank", 0)),
    "rank that is a bool": lambda: edited(set_in("rank", True)),
    "no tensors": lambda: edited(lambda content: content.pop("tensors")),
    "absurd shape": lambda: edited(set_in("tensors", 0, 3, [2**40, 2**40])),
    "negative shape": lambda: edited(set_in("tensors", 0, 3, [-4, -6])),
    "fractional shape": lambda: edited(set_in("tensors", 0, 3, [4.0, 6])),
    "too many dims": lambda: edited(set_in("tensors", 0, 3, [1] * 33)),
    "unknown dtype": lambda: edited(set_in("tensors", 0, 2, "object")),
    "name with a line break": lambda: edited(set_in("tensors", 0, 0, "a\nb")),
    "endless name": lambda: edited(set_in("tensors", 0, 0, "a" * 2000)),
    "short tensor row": lambda: edited(set_in("tensors", 0, ["a"])),
    "tensor that is not there": lambda: edited(set_in("chunks", 0, 0, 1)),
    "negative tensor number": lambda: edited(set_in("chunks", 0, 0, -1)),
    "box of other dims": lambda: edited(set_in("chunks", 0, 1, [[0, 4]])),
    "box that is outside": lambda: edited(set_in("chunks", 0, 1, [[0, 4], [0, 7]])),
    "empty box": lambda: edited(set_in("chunks", 0, 1, [[2, 2], [0, 6]])),
    "start outside": lambda: edited(set_in("chunks", 0, 2, 7)),
    "negative start": lambda: edited(set_in("chunks", 0, 2, -1)),
    "no elements": lambda: edited(set_in("chunks", 0, 3, 0)),
    "unaligned offset": lambda: edited(set_in("chunks", 0, 4, 4)),
    "offset past the end": lambda: edited(set_in("chunks", 0, 4, 8192)),
    "other number of bytes": lambda: edited(set_in("chunks", 0, 5, 76)),
    "chunk larger than memory": lambda: edited(set_in("chunks", 0, 5, MAX_CHUNK_BYTES + 4)),
    "digest that is none": lambda: edited(set_in("chunks", 0, 6, "zz")),
    "overlapping chunks": lambda: edited(lambda content: content["chunks"].append(content["chunks"][0])),
    "file larger than disks": lambda: edited(set_in("nbytes", 2**63)),
    "scalar that is no number": lambda: edited(set_in("scalars", 0, 2, "3")),
    "scalar of unknown kind": lambda: edited(set_in("scalars", 0, 1, "object")),
    "scalar of names that are none": lambda: edited(set_in("scalars", 0, 3, [1])),
    "meta that is a list": lambda: edited(set_in("meta", [])),
}


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_manifest_is_refused(make: Any) -> None:
    with pytest.raises(CheckpointError, match="here"):
        parse_manifest(make(), "here", 1)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=4), lambda inner: st.lists(inner, max_size=4)))
def test_any_value_in_any_field_is_read_or_refused(value: Any) -> None:
    for path in [
        ("tensors",),
        ("chunks",),
        ("scalars",),
        ("tensors", 0),
        ("chunks", 0),
        ("scalars", 0),
        ("nbytes",),
        ("meta",),
    ]:
        with contextlib.suppress(CheckpointError):
            parse_manifest(edited(set_in(*path, value)), "here", 1)


def test_commit_must_name_its_manifests_in_order() -> None:
    for refs in ([], REFS[::-1], [FileRef("../rank-00000.json", 1, digest(b""))], [FileRef("rank-00000.json", 1, "x")]):
        with pytest.raises(CheckpointError, match="here"):
            parse_commit(
                dump_commit(a_commit(manifests=refs)) if refs[:1] != [FileRef("rank-00000.json", 1, "x")] else b"x", "here"
            )


def test_commit_must_hold_what_a_restore_needs() -> None:
    for changes in ({"engine": {}}, {"optimizer": {"class": "AdamW"}}, {"step": -1}):
        with pytest.raises(CheckpointError, match="here"):
            parse_commit(dump_commit(a_commit(manifests=REFS, **changes)), "here")


def test_commit_with_another_root_is_refused() -> None:
    body = dump_commit(a_commit(manifests=REFS)).splitlines()[0].replace(a_commit(manifests=REFS).root.encode(), b"0" * 32)
    with pytest.raises(CheckpointError, match="Merkle root"):
        parse_commit(body + b"\n" + digest(body).encode() + b"\n", "here")


def part(box: Any, start: int, numel: int) -> Chunk:
    return Chunk(TENSOR, box, start, numel, "rank-00000.bin", 0, 4 * numel, digest(b""))


@pytest.mark.parametrize(
    ("pieces", "defect"),
    [
        ([(((0, 4), (0, 6)), 0, 24)], None),
        ([(((0, 2), (0, 6)), 0, 12), (((2, 4), (0, 6)), 0, 5), (((2, 4), (0, 6)), 5, 7)], None),
        ([(((0, 4), (0, 6)), 0, 20)], "elements 20..24 are missing"),
        ([(((0, 4), (0, 6)), 0, 20), (((0, 4), (0, 6)), 19, 5)], "elements 19..20 are stored twice"),
        ([(((0, 2), (0, 6)), 0, 12)], "12 of 24 elements are stored"),
        ([(((0, 3), (0, 6)), 0, 18), (((2, 4), (0, 6)), 0, 12)], "overlap"),
    ],
)
def test_coverage(pieces: list[Any], defect: str | None) -> None:
    found = check_coverage(TENSOR, [part(*piece) for piece in pieces])
    assert found == defect or (defect is not None and found is not None and defect in found)


def test_what_the_writer_makes_is_read_back(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, some_values())
    for rank in range(2):
        data = (path / f"rank-{rank:05d}.json").read_bytes()
        manifest = parse_manifest(data, "here", rank)
        assert dump_manifest(manifest) == data
        assert all(chunk.nbytes <= 64 for chunk in manifest.chunks)
        assert manifest.meta == {"rank": rank}
