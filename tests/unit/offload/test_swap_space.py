"""A rank's folder of swap files: claimed, reserved, explained, and removed when nobody holds it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time

import pytest

from anyshard.configs.errors import EnvError
from anyshard.offload import swap_space
from anyshard.offload.swap_space import LOCK, PARENT, SwapSpace, drive_of, file_system, remove_leftovers

MIB = 2**20


@pytest.fixture
def space(tmp_path):
    with SwapSpace.claim(str(tmp_path / "drive"), run=tmp_path / "run", rank=3) as claimed:
        yield claimed


def test_a_folder_for_each_attempt_and_nothing_left_afterwards(tmp_path):
    drive = str(tmp_path / "drive")
    with SwapSpace.claim(drive, run=tmp_path / "run", rank=0) as one, SwapSpace.claim(drive, run=tmp_path, rank=0) as two:
        assert one.folder != two.folder
        assert str(tmp_path / "run") in (one.folder / LOCK).read_text()
        assert one.trouble() is None
    assert not list((tmp_path / "drive" / PARENT).iterdir())


def test_what_a_dead_process_left_is_removed_and_what_a_live_one_holds_is_not(tmp_path, space):
    claim = "import os,sys,pathlib; from anyshard.offload.swap_space import SwapSpace as S; p = pathlib.Path(sys.argv[1]);"
    claim += (
        "s = S.claim(str(p), run=p, rank=0); (s.folder / 'x.swp').write_bytes(b'x'); print(s.folder, flush=True); os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", claim, str(tmp_path / "drive")], capture_output=True, text=True, check=False)
    left = done.stdout.strip()
    assert os.path.exists(left), done.stderr
    with SwapSpace.claim(str(tmp_path / "drive"), run=tmp_path / "run", rank=3) as mine:
        assert [str(folder) for folder in mine.removed] == [left]
    assert not os.path.exists(left)
    assert space.trouble() is None


def test_a_folder_that_is_being_made_is_left_alone_for_a_while(tmp_path):
    young, old = tmp_path / ".claiming-a", tmp_path / ".claiming-b"
    for folder in (young, old):
        folder.mkdir()
    os.utime(old, (time.time() - 3600,) * 2)
    (tmp_path / "file").touch()
    assert remove_leftovers(tmp_path) == [old]
    assert young.exists()
    assert remove_leftovers(tmp_path / "nothing") == []


def test_reserved_files_have_all_their_blocks(space):
    files = {space.folder / "a" / "x.swp": 3 * MIB, space.folder / "y.swp": 1024}
    with pytest.raises(EnvError, match="GiB free"):
        space.require_whole(files)
    space.reserve(files)
    space.require_whole(files)
    assert 3 * MIB < space.used_bytes() < 4 * MIB


def test_too_little_space_is_told_with_the_numbers_and_given_back(space):
    free = os.statvfs(space.folder)
    large = 2 * free.f_bavail * free.f_frsize
    with pytest.raises(EnvError, match=rf"take {(large + MIB) / 2**30:.2f} GiB .*Free some"):
        space.reserve({space.folder / "small.swp": MIB, space.folder / "large.swp": large})
    assert space.used_bytes() == 0


def test_a_short_file_is_one_that_could_not_be_written(space):
    sparse = space.folder / "sparse.swp"
    with sparse.open("wb") as file:
        file.truncate(MIB)
    with pytest.raises(EnvError, match="No space left"):
        space.require_whole({sparse: MIB})


def test_no_place_to_write(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(EnvError, match="local drive that this user writes"):
        SwapSpace.claim(str(tmp_path / "file"), run=tmp_path, rank=0)


@pytest.mark.parametrize(
    ("fails", "code", "says"),
    [
        (lambda size: True, errno.EINVAL, "does not do direct I/O"),
        (lambda size: True, errno.ENOSPC, "free space"),
        (lambda size: size < 4096, errno.EINVAL, "sectors of 512 bytes"),
    ],
)
def test_a_drive_that_deepspeed_cannot_write(monkeypatch, tmp_path, fails, code, says):
    write = swap_space._write_direct

    def refuse(path, num_bytes):
        if fails(num_bytes):
            raise OSError(code, os.strerror(code))
        write(path, num_bytes)

    monkeypatch.setattr(swap_space, "_write_direct", refuse)
    with pytest.raises(EnvError, match=says):
        SwapSpace.claim(str(tmp_path), run=tmp_path, rank=0)
    assert not list((tmp_path / PARENT).iterdir())


def test_what_happened_to_a_drive(monkeypatch, space):
    with monkeypatch.context() as patch:
        patch.setattr(swap_space, "_write_direct", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
        assert "does not take writes any more: Input/output error" in space.trouble()
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", lambda _: type("S", (), {"f_flag": os.ST_RDONLY}))
        assert "read-only" in space.trouble()
    (space.folder / LOCK).unlink()
    assert "is gone" in space.trouble()


def test_ranks_take_drives_in_turn():
    assert [drive_of("/a, /b,", rank) for rank in range(3)] == ["/a", "/b", "/a"]


def test_the_file_system_of_a_path():
    assert file_system(swap_space.Path("/dev/shm")) == "tmpfs"
