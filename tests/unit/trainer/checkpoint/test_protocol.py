"""The protocol of one process: what rank 0 checks before it commits. Several ranks are in tests/dist."""

from dataclasses import replace
from pathlib import Path

import pytest
from helpers.checkpoints import a_commit, fragments_of, some_values

from anyshard.configs.errors import CheckpointError
from anyshard.trainer.checkpoint.catalog import verify
from anyshard.trainer.checkpoint.exchange import Exchange
from anyshard.trainer.checkpoint.faults import Faults
from anyshard.trainer.checkpoint.protocol import Protocol
from anyshard.trainer.checkpoint.retention import Retention
from anyshard.trainer.checkpoint.store_files import FileStore
from anyshard.trainer.checkpoint.writer import Written, write_rank


def protocol_in(directory: Path) -> Protocol:
    return Protocol(FileStore(directory), Retention(3), Exchange(None, 1.0), Faults("", 0))


def write(directory: Path) -> Written:
    return write_rank(directory, 0, fragments_of(some_values()), [], {})


def nothing(num_bytes: int) -> None:
    """Nobody wants to know."""


def test_a_save(tmp_path: Path) -> None:
    path, num_bytes = protocol_in(tmp_path).save(1, write, a_commit, nothing)
    assert path == tmp_path / "step-00000001"
    assert num_bytes == (path / "rank-00000.bin").stat().st_size
    assert verify(path) == []


@pytest.mark.parametrize("lie", ["data", "manifest"])
def test_sizes_are_those_of_the_disk(tmp_path: Path, lie: str) -> None:
    """A rank that says another size than the file system has (a lost write, two writers) is not believed."""
    made = protocol_in(tmp_path)
    made.save(1, write, a_commit, nothing)

    def lying(directory: Path) -> Written:
        honest = write(directory)
        if lie == "data":
            return replace(honest, data_bytes=honest.data_bytes + 4096)
        return replace(honest, manifest=replace(honest.manifest, nbytes=honest.manifest.nbytes - 1))

    with pytest.raises(CheckpointError, match=r"step 2 was not saved: .* has \d+ bytes, rank 0 wrote \d+\.") as caught:
        made.save(2, lying, lambda: a_commit(step=2), nothing)
    assert str(tmp_path / "step-00000002" / ("rank-00000.bin" if lie == "data" else "rank-00000.json")) in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]
