"""Which operators a configuration needs, what their state is, and which build locks are stale."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from anyshard.configs import schema
from anyshard.offload import op_cache
from anyshard.offload.op_cache import OPS, extensions_dir, missing, needed_ops, op_env, remove_stale_locks, stale_locks, status


def _config(optimizer: str = "adamw", state: str = "none", param: str = "none") -> schema.Config:
    config = schema.Config()
    config.optimizer.name = optimizer
    config.offload.optimizer, config.offload.param = schema.Device(state), schema.Device(param)
    return config


@pytest.mark.parametrize(
    ("config", "accelerator", "expected"),
    [
        (_config(), "cpu", ["shm_comm"]),
        (_config(), "cuda", []),
        (_config(state="cpu"), "cuda", ["cpu_adam"]),
        (_config("lion", state="cpu"), "cpu", ["shm_comm", "cpu_lion"]),
        (_config("sgd", state="cpu"), "cpu", ["shm_comm"]),
        (_config("sgd", param="nvme"), "cuda", ["async_io"]),
        (_config(state="nvme", param="nvme"), "cuda", ["cpu_adam", "async_io"]),
    ],
)
def test_needed_ops(config: schema.Config, accelerator: str, expected: list[str]) -> None:
    assert needed_ops(config, accelerator) == expected


def test_every_operator_names_a_builder_of_deepspeed() -> None:
    from deepspeed.ops.op_builder import (
        all_ops,  # noqa: F401  (its import lists what exists for this accelerator)
        cpu,
    )

    for op in OPS.values():
        assert op.library == getattr(cpu, op.builder).NAME


def test_the_extensions_directory_is_the_configured_or_the_environments(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert extensions_dir({"TORCH_EXTENSIONS_DIR": "/somewhere"}) == Path("/somewhere")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert extensions_dir({}) == tmp_path / "torch_extensions"
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path))  # no virtual environment
    assert extensions_dir({"ANYSHARD_CACHE": "/cache"}).parent == Path("/cache")


def test_op_env_puts_the_environments_scripts_on_path_once() -> None:
    scripts = str(Path(sys.executable).parent)
    first = op_env({"PATH": "/usr/bin"})["PATH"]
    assert first.split(os.pathsep) == [scripts, "/usr/bin"]
    assert op_env({"PATH": first})["PATH"] == first


def test_status_needs_a_library_newer_than_what_it_was_compiled_against(tmp_path: Path) -> None:
    library = tmp_path / "cpu_adam" / "cpu_adam.so"
    assert status(["cpu_adam"], tmp_path)[0].state != "built"
    library.parent.mkdir()
    library.touch()
    assert status(["cpu_adam"], tmp_path)[0].state == "built"
    os.utime(library, (0, 0))
    assert status(["cpu_adam"], tmp_path)[0].state != "built"


def test_what_is_missing_is_named_with_the_command_that_brings_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def lack(name: str = "cpu_adam", **environ: str) -> str:
        return " ".join(missing(OPS[name], environ) or ())

    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert "apt-get install -y g++" in lack(PATH=str(tmp_path))
    for tool in ("c++", "ninja"):
        assert lack(PATH=str(tmp_path)), tool
        (tmp_path / tool).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / tool).chmod(0o755)
        if tool == "c++":
            assert "pip install ninja" in lack(PATH=str(tmp_path))
    assert "apt-get install -y libaio-dev" in lack("async_io", PATH=str(tmp_path))
    assert "my-c++" in lack(PATH=str(tmp_path), CXX="my-c++")
    monkeypatch.setattr(op_cache.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert "apt-get install -y python3-dev" in lack(PATH=str(tmp_path))


def test_a_lock_is_stale_once_no_process_has_it_open(tmp_path: Path) -> None:
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    assert stale_locks(tmp_path) == []
    hold = "import os, sys, time; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", hold, str(lock)], stdout=subprocess.PIPE) as builder:
        assert builder.stdout is not None
        builder.stdout.readline()
        assert stale_locks(tmp_path) == []
        builder.kill()
    assert stale_locks(tmp_path) == [lock]
    assert remove_stale_locks(tmp_path) == [lock]
    assert not lock.exists()


def test_a_lock_on_a_network_file_system_must_be_old_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    monkeypatch.setattr(op_cache, "_on_network", lambda directory: True)
    assert stale_locks(tmp_path) == []
    old = time.time() - op_cache.REMOTE_LOCK_AGE_S - 1
    os.utime(lock, (old, old))
    assert stale_locks(tmp_path) == [lock]
