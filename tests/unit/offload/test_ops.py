"""Building operators: what is skipped, what is said, and the errors."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from anyshard.configs.errors import EnvError
from anyshard.offload import ops
from anyshard.offload.op_cache import OPS, OpStatus


@pytest.fixture(autouse=True)
def _restore_environ(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", os.environ["PATH"])
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))


def test_what_is_built_is_not_built_again_and_a_stale_lock_goes(tmp_path: Path) -> None:
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "cpu_adam" / "cpu_adam.so").touch()
    (tmp_path / "cpu_adam" / "lock").touch()
    said: list[str] = []
    ops.build(["cpu_adam"], said.append)
    assert "removed" in said[0]
    assert said[1].startswith("operators cpu_adam are built in")
    assert not (tmp_path / "cpu_adam" / "lock").exists()


def test_an_unknown_operator_is_refused() -> None:
    with pytest.raises(EnvError, match="no operator is called cpu_adamm: there are shm_comm, cpu_adam"):
        ops.build(["cpu_adamm"])


def test_a_missing_compiler_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lacking = OpStatus(OPS["cpu_adam"], "missing", "no C++ compiler is on PATH.", "Install one: apt-get install -y g++.")
    monkeypatch.setattr(ops, "status", lambda names: [lacking])
    assert ops.main(["build", "cpu_adam"]) == 3
    assert "cannot be built: no C++ compiler is on PATH. Install one: apt-get install -y g++" in capsys.readouterr().err


def test_a_failed_compilation_shows_the_compilers_words(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.ops.op_builder import cpu

    class Broken:
        def load(self, verbose: bool) -> None:
            raise RuntimeError("adam.cpp:1: error: expected ';'")

    monkeypatch.setattr(cpu, "CPUAdamBuilder", Broken)
    with pytest.raises(EnvError, match=r"did not compile.*\n.*expected ';'"):
        ops.build(["cpu_adam"], lambda line: None)


def test_cpu_optimizers() -> None:
    assert ops.cpu_optimizer("adamw").__name__ == "DeepSpeedCPUAdam"
    assert ops.cpu_optimizer("lion").__name__ == "DeepSpeedCPULion"
    with pytest.raises(ValueError, match="adamw and lion"):
        ops.cpu_optimizer("sgd")


def test_status_prints_every_operator(capsys: pytest.CaptureFixture[str]) -> None:
    assert ops.main(["status"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(OPS)
