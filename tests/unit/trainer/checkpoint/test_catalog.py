"""Finding checkpoints on disk, and finding every damage."""

import os
import random
import shutil
from pathlib import Path

import pytest
from helpers.checkpoints import some_values, write_checkpoint

from anyshard.configs.errors import CheckpointError
from anyshard.trainer.checkpoint.catalog import (
    Damage,
    index_chunks,
    list_checkpoints,
    read_commit,
    read_manifests,
    resolve,
    verify,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path, some_values())


def flip(file: Path, position: int, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1 << bit
    file.write_bytes(data)


def test_a_sound_checkpoint(path: Path) -> None:
    assert verify(path) == []
    (found,) = list_checkpoints(path.parent)
    assert (found.path, found.step, found.problem) == (path, 1, None)


def test_every_byte_of_every_file_is_checked(path: Path) -> None:
    """One random bit of every byte: COMMIT, manifests, elements and padding."""
    rng = random.Random(0)
    total = 0
    for file in sorted(path.iterdir()):
        data = file.read_bytes()
        # every byte of the small files; of the data files every byte of elements and some of the padding
        positions = [p for p in range(len(data)) if not file.name.endswith(".bin") or p % 4096 < 80 or p % 509 == 0]
        for position in positions:
            flip(file, position, rng.randrange(8))
            damages = verify(path)
            assert damages, (file.name, position)
            assert file.name in str(damages[0])
            file.write_bytes(data)
            total += 1
    assert total > 3000
    assert verify(path) == []


def test_ten_thousand_flips_and_cuts_are_all_seen(tmp_path: Path) -> None:
    """Of a checkpoint in pieces of a page, so that elements, padding, manifests and COMMIT all have their share."""
    path = write_checkpoint(tmp_path, {("w", "param"): some_values()["a.weight", "exp_avg"]}, chunk_bytes=4096)
    rng = random.Random(1)
    files = {file: file.read_bytes() for file in sorted(path.iterdir())}
    silent = []
    for number in range(10_000):
        file, data = rng.choice(list(files.items()))
        position = rng.randrange(len(data))
        if number % 4:
            bit = rng.randrange(8)
            damaged = data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :]
        else:
            bit, damaged = None, data[:position]
        file.write_bytes(damaged)
        if not verify(path):
            silent.append((file.name, position, bit))
        file.write_bytes(data)
    assert silent == []
    assert verify(path) == []


def test_a_damage_says_where_and_in_which_tensor(path: Path) -> None:
    chunk = read_manifests(path, read_commit(path))[1].chunks[-1]
    flip(path / "rank-00001.bin", chunk.offset, 0)
    (damage,) = verify(path)
    label = f"{chunk.tensor.name} [{chunk.tensor.key}]"
    assert damage == Damage("rank-00001.bin", "checksum mismatch", chunk.offset, chunk.nbytes, label)
    assert str(damage) == f"rank-00001.bin, bytes {chunk.offset}..{chunk.offset + chunk.nbytes}, {label}: checksum mismatch"


@pytest.mark.parametrize("name", ["COMMIT", "rank-00000.json", "rank-00001.json", "rank-00000.bin", "rank-00001.bin"])
def test_truncated_longer_or_missing_files(path: Path, name: str) -> None:
    whole = (path / name).read_bytes()
    for data in (b"", whole[:-1], whole[: len(whole) // 2], whole + b"\0"):
        (path / name).write_bytes(data)
        assert verify(path), len(data)
        assert verify(path, data=False)
        assert list_checkpoints(path.parent)[0].problem is not None
    (path / name).unlink()
    assert verify(path)


def test_swapped_data_files_are_found(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, {("w", "param"): some_values()["a.weight", "param"][:6, :10].clone()}, chunk_bytes=4096)
    os.rename(path / "rank-00000.bin", path / "x")
    os.rename(path / "rank-00001.bin", path / "rank-00000.bin")
    os.rename(path / "x", path / "rank-00001.bin")
    assert len(verify(path)) == 2


def test_a_manifest_of_another_checkpoint_is_found(tmp_path: Path) -> None:
    one, two = write_checkpoint(tmp_path, some_values(0), step=1), write_checkpoint(tmp_path, some_values(1), step=2)
    shutil.copy(two / "rank-00000.json", one / "rank-00000.json")
    (damage,) = verify(one, data=False)
    assert "checksum is not the one in COMMIT" in damage.what


def test_a_renamed_checkpoint_is_found(path: Path) -> None:
    other = path.rename(path.with_name("step-00000007"))
    assert "it is of step 1" in verify(other)[0].what


def test_unreadable_data(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def broken(self: Path, *args: object, **kwargs: object) -> object:
        if self.name == "rank-00001.bin":
            raise OSError(5, "Input/output error")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", broken)
    damages = verify(path)
    assert {(damage.file, damage.what) for damage in damages} == {("rank-00001.bin", "cannot be read (Input/output error)")}


def test_ranks_share_the_work(path: Path) -> None:
    every = [chunk for manifest in read_manifests(path, read_commit(path)) for chunk in manifest.chunks]
    for chunk in every:
        flip(path / chunk.file, chunk.offset, 2)
    parts = [verify(path, rank=rank, world_size=3) for rank in range(3)]
    assert all(parts)
    assert sorted(str(damage) for part in parts for damage in part) == sorted(map(str, verify(path)))
    assert sum(len(part) for part in parts) == len(every)


def test_progress_ends_at_the_total(path: Path) -> None:
    seen: list[tuple[int, int]] = []
    verify(path, lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 0
    assert seen == sorted(seen)


def test_list_is_newest_first_and_ignores_what_is_temporary(tmp_path: Path) -> None:
    for step in (5, 100, 20):
        write_checkpoint(tmp_path, some_values(), step=step)
    (tmp_path / "step-00000200.tmp-0123").mkdir()
    (tmp_path / "latest").write_text("x")
    (tmp_path / "step-00000300").mkdir()
    found = list_checkpoints(tmp_path)
    assert [each.step for each in found] == [300, 100, 20, 5]
    assert "cannot be read" in (found[0].problem or "")
    assert list_checkpoints(tmp_path / "none") == []


def test_resolve(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_checkpoint(run / "checkpoints", some_values(), step=1)
    newest = write_checkpoint(run / "checkpoints", some_values(), step=2)
    (run / "checkpoints" / "step-00000003").mkdir()
    assert resolve(run) == resolve(run / "checkpoints") == resolve(newest) == newest
    moved = newest.rename(tmp_path / "best")
    assert resolve(moved) == moved
    for missing in (tmp_path / "nothing", tmp_path / "step-00000009"):
        with pytest.raises(CheckpointError, match="there is no"):
            resolve(missing)


def test_ranks_that_disagree_about_a_tensor(tmp_path: Path) -> None:
    manifests = []
    for number, columns in enumerate((4, 5)):
        values = {("w", "param"): some_values()["a.weight", "param"][:, :columns].contiguous()}
        path = write_checkpoint(tmp_path, values, step=number, world_size=1)
        manifests += read_manifests(path, read_commit(path))
    with pytest.raises(CheckpointError, match="disagree"):
        index_chunks(manifests)
    with pytest.raises(CheckpointError, match="stored twice"):
        index_chunks([manifests[0], manifests[0]])
