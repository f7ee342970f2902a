"""Reading what other layouts wrote: whole tensors, arbitrary pieces, other precisions, damage on the way."""

import tracemalloc
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import Values, empty_like, fragments_of, some_values, write_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from anyshard.configs.errors import CheckpointError
from anyshard.trainer.checkpoint.boxes import share
from anyshard.trainer.checkpoint.catalog import index_chunks, read_commit, read_manifests
from anyshard.trainer.checkpoint.layout import Fragment
from anyshard.trainer.checkpoint.manifest import Tensor
from anyshard.trainer.checkpoint.reader import ChunkIndex, check_same_model, plan_reads, read_into
from anyshard.trainer.checkpoint.writer import file_bytes


def index_of(path: Path) -> ChunkIndex:
    return index_chunks(read_manifests(path, read_commit(path)))


def equal(one: Values, two: Values) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("chunk_bytes", [64, 4096])
def test_whole_tensors_come_back(tmp_path: Path, world_size: int, chunk_bytes: int) -> None:
    values = some_values()
    path = write_checkpoint(tmp_path, values, world_size=world_size, chunk_bytes=chunk_bytes)
    found = empty_like(values)
    read_into(path, fragments_of(found), index_of(path), verify=True)
    assert equal(values, found)


@given(st.data())
def test_any_piece_of_any_other_cut(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Written by some number of ranks, read by ranks that hold any intervals."""
    values = some_values(data.draw(st.integers(0, 3)))
    path = write_checkpoint(
        tmp_path_factory.mktemp("cut"),
        values,
        world_size=data.draw(st.integers(1, 4)),
        chunk_bytes=data.draw(st.sampled_from([16, 24, 64, 4096])),
    )
    index = index_of(path)
    readers = data.draw(st.integers(1, 5))
    found = empty_like(values)
    whole = fragments_of(found)
    for rank in range(readers):
        pieces = share([fragment.numel for fragment in whole], rank, readers)
        mine = [Fragment(whole[i].tensor, start, whole[i].view.narrow(0, start, n), False) for i, start, n in pieces]
        read_into(path, mine, index, verify=True)
    assert equal(values, found)


def test_only_the_chunks_that_are_needed_are_read(tmp_path: Path) -> None:
    values = {("w", "param"): torch.arange(1000.0)}
    path = write_checkpoint(tmp_path, values, world_size=2, chunk_bytes=400)
    target = torch.zeros(50)
    fragment = Fragment(Tensor("w", "param", "float32", (1000,)), 475, target, False)
    assert [(name, len(reads)) for name, reads in plan_reads([fragment], index_of(path)).items()] == [
        ("rank-00000.bin", 1),
        ("rank-00001.bin", 1),
    ]
    assert read_into(path, [fragment], index_of(path), verify=True) == 800
    assert torch.equal(target, torch.arange(475.0, 525.0))


def test_another_precision_is_converted(tmp_path: Path) -> None:
    values = {("w", "param"): torch.tensor([1.0, 2.5, -3.25]).bfloat16()}
    path = write_checkpoint(tmp_path, values)
    target = torch.zeros(3)
    read_into(path, [Fragment(Tensor("w", "param", "float32", (3,)), 0, target, False)], index_of(path), verify=True)
    assert target.tolist() == [1.0, 2.5, -3.25]


def test_damage_is_found_while_reading(tmp_path: Path) -> None:
    values = {("w", "param"): torch.arange(100.0)}
    path = write_checkpoint(tmp_path, values, world_size=1, chunk_bytes=4096)
    index, file = index_of(path), path / "rank-00000.bin"
    data = bytearray(file.read_bytes())
    data[17] ^= 4
    file.write_bytes(data)
    found = empty_like(values)
    with pytest.raises(CheckpointError, match=r"rank-00000.bin, bytes 0..400, w \[param\]: checksum mismatch"):
        read_into(path, fragments_of(found), index, verify=True)
    assert not found["w", "param"].any(), "nothing of a damaged chunk is used"
    read_into(path, fragments_of(found), index, verify=False)
    file.write_bytes(data[:100])
    with pytest.raises(CheckpointError, match="the file ends early"):
        read_into(path, fragments_of(found), index, verify=False)


def test_another_model_is_named_by_its_first_difference(tmp_path: Path) -> None:
    values = some_values()
    index = index_of(write_checkpoint(tmp_path, values))
    wanted = {(name, key): tuple(value.shape) for (name, key), value in values.items() if key != "exp_avg"}
    check_same_model(wanted, index)
    with pytest.raises(CheckpointError, match=r"its a.bias has shape \(5,\), this model's has \(6,\)"):
        check_same_model({**wanted, ("a.bias", "param"): (6,)}, index)
    with pytest.raises(CheckpointError, match=r"it has no more \[param\]"):
        check_same_model({("more", "param"): (1,), **wanted}, index)
    del wanted["scalar", "param"]
    with pytest.raises(CheckpointError, match="it holds scalar, which this model does not have"):
        check_same_model(wanted, index)


def test_chunks_are_aligned_and_padding_is_less_than_a_page(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, some_values(), world_size=1, chunk_bytes=64)
    (manifest,) = read_manifests(path, read_commit(path))
    assert all(chunk.offset == 4096 * number for number, chunk in enumerate(manifest.chunks))
    assert manifest.num_bytes == 4096 * len(manifest.chunks) == file_bytes(path / "rank-00000.bin")


def test_a_restore_needs_the_memory_of_one_chunk(tmp_path: Path) -> None:
    values = {("w", "param"): torch.zeros(4_000_000)}
    path = write_checkpoint(tmp_path, values, world_size=1, chunk_bytes=2**20)
    targets, index = fragments_of(empty_like(values)), index_of(path)
    tracemalloc.start()
    assert read_into(path, targets, index, verify=True) == 16_000_000
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 2 * 2**20 + 200_000  # the next chunk's buffer exists before the last one's is gone
