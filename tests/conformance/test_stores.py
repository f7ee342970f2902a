"""Every kind of place for checkpoints keeps the same promises. A new one is added to PLACES."""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import a_commit, empty_like, fragments_of, some_values
from helpers.s3 import BUCKET, s3_server

from anyshard.configs.errors import CheckpointError
from anyshard.configs.places import place
from anyshard.trainer.checkpoint import catalog, ram, retention
from anyshard.trainer.checkpoint.exchange import Exchange
from anyshard.trainer.checkpoint.faults import Faults
from anyshard.trainer.checkpoint.protocol import Protocol
from anyshard.trainer.checkpoint.reader import read_into
from anyshard.trainer.checkpoint.retention import Retention
from anyshard.trainer.checkpoint.store import Store, store_of
from anyshard.trainer.checkpoint.writer import Written, write_rank

PLACES = ["files", "memory", "s3"]


@pytest.fixture(scope="module")
def server() -> Iterator[dict[str, str]]:
    with s3_server() as variables:
        yield variables


@pytest.fixture(params=PLACES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "s3":
        request.getfixturevalue("server")
    unique = uuid.uuid4().hex
    urls = {"files": str(tmp_path), "memory": f"memory://{unique}", "s3": f"s3://{BUCKET}/{unique}"}
    return store_of(place(urls[request.param]) / "run" / "checkpoints")


def write(directory: Path) -> Written:
    return write_rank(directory, 0, fragments_of(some_values()), [], {}, chunk_bytes=64)


def nothing(num_bytes: int) -> None:
    """Nobody wants to know."""


def save(store: Store, step: int, write: Any = write, keep: int = 0) -> Path:
    protocol = Protocol(store, Retention(keep), Exchange(None, 1.0), Faults("", 0))
    return protocol.save(step, write, lambda: a_commit(step=step), nothing)[0]


def steps_in(store: Store) -> list[int]:
    return sorted(found.step for found in catalog.list_checkpoints(store.directory))


def test_what_is_saved_is_read(store: Store) -> None:
    path = save(store, 3)
    assert steps_in(store) == [3]
    assert catalog.verify(path) == []
    assert catalog.resolve(store.directory) == catalog.resolve(store.directory.parent) == path
    commit = catalog.read_commit(path)
    chunks = catalog.index_chunks(catalog.read_manifests(path, commit))
    values = empty_like(some_values())
    read_into(path, fragments_of(values), chunks, verify=True)
    assert all(torch.equal(values[name], value) for name, value in some_values().items())
    assert sorted(file.name for file in path.iterdir()) == ["COMMIT", "rank-00000.bin", "rank-00000.json"]
    assert (store.directory / "latest").read_bytes() == b"step-00000003\n"


def test_more_than_one_part(store: Store) -> None:
    """40 MiB in blocks of 16, hashed when they are read again."""
    values = {("w", "param"): torch.randn(10 * 2**20), ("v", "param"): torch.arange(12345)}
    path = save(store, 1, lambda directory: write_rank(directory, 0, fragments_of(values), [], {}))
    assert (path / "rank-00000.bin").stat().st_size > 40 * 2**20
    assert catalog.verify(path) == []


def test_it_does_not_exist_before_it_is_committed(store: Store) -> None:
    seen = []

    def look(directory: Path) -> Written:
        written = write(directory)
        seen.append((steps_in(store), len(store.being_written()), store.collect()))
        return written

    save(store, 1, look)
    assert seen == [([], 1, [])]
    assert store.being_written() == []


def test_a_save_that_fails_leaves_nothing(store: Store) -> None:
    save(store, 1)

    def fail(directory: Path) -> Written:
        write(directory)
        with store.data_file(directory / "rank-00001.bin", 2 * 4096) as append:
            append(memoryview(bytearray(4096)), 0)
            raise OSError(5, "Input/output error")

    with pytest.raises(CheckpointError, match="step 2 was not saved"):
        save(store, 2, fail)
    assert sorted(path.name for path in store.directory.iterdir()) == ["latest", "step-00000001"]
    assert save(store, 2).name == "step-00000002"


def test_sizes_are_checked(store: Store) -> None:
    def lie(directory: Path) -> Written:
        return dataclasses.replace(write(directory), data_bytes=1)

    with pytest.raises(CheckpointError, match=r"rank 0 wrote 1\."):
        save(store, 1, lie)
    assert steps_in(store) == []


def test_a_step_is_saved_again(store: Store) -> None:
    save(store, 1)
    save(store, 2)
    path = save(store, 2, lambda directory: write_rank(directory, 0, fragments_of(some_values(7)), [], {}))
    assert steps_in(store) == [1, 2]
    assert catalog.verify(path) == []


def test_old_ones_go(store: Store) -> None:
    for step in (1, 2, 3, 4):
        save(store, step, keep=2)
    assert steps_in(store) == [3, 4]
    store.remove(store.directory / "step-00000003")
    assert sorted(path.name for path in store.directory.iterdir()) == ["latest", "step-00000004"]


def test_what_a_crash_left_goes(store: Store) -> None:
    save(store, 1)
    begun = store.begin("step-00000002")
    write(begun)
    assert store.collect() == [], "its writer lives"
    content = json.loads((begun / retention.LEASE).read_bytes())
    (begun / retention.LEASE).write_bytes(json.dumps({**content, "pid": 2**22 + 1}).encode())
    assert store.being_written() == []
    assert store.collect() == [begun.name]
    assert sorted(path.name for path in store.directory.iterdir()) == ["latest", "step-00000001"]
    assert steps_in(store) == [1]


def test_later_steps_are_set_aside(store: Store) -> None:
    for step in (1, 2, 3):
        save(store, step)
    names = store.set_aside(1)
    assert len(names) == 2
    assert steps_in(store) == [1]
    assert store.collect() == []
    assert all((store.directory / name).exists() for name in names), "they are not deleted"
    assert store.set_aside(1) == []


def test_damage_is_found(store: Store) -> None:
    path = save(store, 1)
    content = bytearray((path / "rank-00000.bin").read_bytes())
    content[4097] ^= 1
    (path / "rank-00000.bin").write_bytes(content)
    (damage,) = catalog.verify(path)
    assert "checksum mismatch" in str(damage)
    (path / "rank-00000.json").unlink()
    assert "cannot be read" in str(catalog.verify(path)[0])


def test_shared_memory_is_drained_to_it(store: Store, tmp_path: Path) -> None:
    source = save(store_of(tmp_path / "memory"), 5)
    saved = ram.drain(tmp_path / "memory", store.directory)
    assert saved == store.directory / "step-00000005"
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == {
        path.name: path.read_bytes() for path in source.iterdir()
    }
    assert catalog.verify(saved) == []


def test_nothing_is_there(store: Store) -> None:
    assert steps_in(store) == store.collect() == store.being_written() == store.set_aside(0) == []
    with pytest.raises(CheckpointError, match="there is no checkpoint here"):
        catalog.resolve(store.directory)
    with pytest.raises(CheckpointError, match="there is no such checkpoint"):
        catalog.resolve(store.directory / "step-00000001")
