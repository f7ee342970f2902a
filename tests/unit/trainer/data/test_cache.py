from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from anyshard.configs import schema
from anyshard.configs.errors import EnvError
from anyshard.trainer.data import cache
from anyshard.trainer.data.cache import build_once, cache_root, fingerprint


def sound(folder: Path) -> str | None:
    return None if (folder / "result").exists() else "no result"


def write(folder: Path) -> None:
    (folder / "result").write_text("done")


def once(target: Path, build: Callable[[Path], None] = write, said: list[str] | None = None) -> Path:
    say = said.append if said is not None else (lambda line: None)
    return build_once(target, damage=sound, build=build, say=say, what="thing")


def test_builds_once(tmp_path: Path) -> None:
    target = tmp_path / "a" / "target"
    calls: list[Path] = []
    for _ in range(3):
        assert once(target, lambda folder: (calls.append(folder), write(folder))[1]) == target
    assert len(calls) == 1
    assert calls[0] != target  # under a temporary name
    assert [path.name for path in target.parent.iterdir() if path.is_dir()] == ["target"]


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        write(folder)
        raise RuntimeError("stopped half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        once(tmp_path / "target", fail)
    assert not (tmp_path / "target").exists()
    assert not list(tmp_path.glob(".target*"))


def test_leftovers_of_a_killed_build_are_removed(tmp_path: Path) -> None:
    stale = tmp_path / ".target.tmp-host-123"
    stale.mkdir()
    once(tmp_path / "target")
    assert not stale.exists()


def test_a_damaged_copy_is_built_again(tmp_path: Path) -> None:
    target = once(tmp_path / "target")
    (target / "result").unlink()
    said: list[str] = []
    once(target, said=said)
    assert (target / "result").read_text() == "done"
    assert "damaged (no result)" in said[0]


def test_waits_for_another_builder_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_WAIT_NOTICE_S", 0.05)
    target = tmp_path / "target"
    other = FileLock(tmp_path / "target.lock", thread_local=False)
    other.acquire()
    unfinished = tmp_path / ".target.tmp-other"
    unfinished.mkdir()
    (unfinished / "part").write_bytes(bytes(3_000_000))

    def finish() -> None:
        time.sleep(0.3)
        target.mkdir()
        write(target)
        other.release()

    thread = threading.Thread(target=finish)
    thread.start()
    said: list[str] = []
    once(target, lambda folder: pytest.fail("the other one built it"), said=said)
    thread.join()
    assert "waiting for another process" in said[0]
    assert "3 MB written" in said[0]


def test_a_full_disk(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")

    with pytest.raises(EnvError, match=r"disk is full.*data.cache_dir"):
        once(tmp_path / "target", fill)


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EnvError, match=r"cannot be written .*data.cache_dir"):
        once(tmp_path / "file" / "target")

    def vanish(folder: Path) -> None:
        (folder / "missing" / "part").write_text("x")

    with pytest.raises(EnvError, match="cannot be written"):
        once(tmp_path / "target", vanish)


def test_other_errors_of_the_system_pass(tmp_path: Path) -> None:
    def network(folder: Path) -> None:
        raise ConnectionResetError("the hub went away")

    with pytest.raises(ConnectionResetError, match="went away"):
        once(tmp_path / "target", network)


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANYSHARD_CACHE", raising=False)
    assert cache_root(schema.Data()) == Path.home() / ".cache" / "anyshard"
    monkeypatch.setenv("ANYSHARD_CACHE", str(tmp_path))
    assert cache_root(schema.Data()) == tmp_path
    assert cache_root(schema.Data(cache_dir="/elsewhere")) == Path("/elsewhere")


def test_fingerprint_keeps_parts_apart() -> None:
    assert fingerprint("a", "b") != fingerprint("ab", "") != fingerprint("a", "b", None)
    assert fingerprint("a", 1) == fingerprint("a", 1)
