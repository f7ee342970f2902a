"""`make setup`: what it asks for, and that it does nothing twice."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/setup.py over an empty folder."""
    spec = importlib.util.spec_from_file_location("anyshard_setup", ROOT / "tools" / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    venv = tmp_path / ".venv"
    for name, value in {"VENV": venv, "PYTHON": venv / "bin/python", "STAMP": venv / "stamp.json", "LOG": venv / "log"}.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.delenv("SETUP_FORCE", raising=False)
    monkeypatch.setattr(module, "has_gpu", lambda: False)
    return module


def test_an_old_python_is_refused(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup.sys, "version_info", (3, 10))
    assert setup.main() == 3
    assert "Python 3.11 or newer is needed" in capsys.readouterr().err


def test_a_finished_environment_is_left_alone_until_its_inputs_change(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[str] = []
    monkeypatch.setattr(setup, "system_packages", lambda: done.append("system"))
    monkeypatch.setattr(setup, "install_packages", lambda: done.append("packages") or True)
    monkeypatch.setattr(setup, "build_operators", lambda: done.append("operators") or True)

    def make() -> None:
        done.append("venv")
        setup.PYTHON.parent.mkdir(parents=True, exist_ok=True)
        setup.PYTHON.touch()

    monkeypatch.setattr(setup, "make_venv", make)
    everything = ["system", "venv", "packages", "operators"]
    assert setup.main() == 0
    assert done == everything
    assert setup.main() == 0
    assert done == everything
    assert "is up to date" in capsys.readouterr().out
    stamp = json.loads(setup.STAMP.read_text())
    setup.STAMP.write_text(json.dumps({**stamp, "inputs": "other"}))
    assert setup.main() == 0
    assert done == everything * 2


def test_a_failed_stage_ends_it_without_a_stamp(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup, "system_packages", lambda: None)
    monkeypatch.setattr(setup, "make_venv", lambda: setup.VENV.mkdir(exist_ok=True))
    monkeypatch.setattr(setup, "install_packages", lambda: False)
    assert setup.main() == 3
    assert "the whole output is in" in capsys.readouterr().err
    monkeypatch.setattr(setup, "install_packages", lambda: True)
    monkeypatch.setattr(setup, "build_operators", lambda: False)
    assert setup.main() == 3
    assert not setup.STAMP.exists()


def test_missing_system_packages_come_with_the_command(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(setup.shutil, "which", lambda name: None)
    monkeypatch.setattr(setup, "system_packages", setup.system_packages)
    assert setup.main() == 3
    assert "Install them: sudo apt-get install -y g++" in capsys.readouterr().err


def test_root_installs_them(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(setup.os, "geteuid", lambda: 0)
    monkeypatch.setattr(setup.shutil, "which", lambda name: None if name == "c++" else f"/usr/bin/{name}")
    monkeypatch.setattr(setup.subprocess, "run", run)
    monkeypatch.delenv("CXX", raising=False)
    assert setup.system_packages() is None
    assert commands[0][:2] == ["apt-get", "update"]
    assert commands[1][:2] == ["apt-get", "install"]
    assert "g++" in commands[1]


def test_pip_shows_the_end_of_a_failure(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    setup.VENV.mkdir()
    monkeypatch.setattr(setup, "PYTHON", Path(sys.executable))
    assert not setup.pip("nothing", ["--no-index", "no-such-package-anywhere"])
    assert "No matching distribution found for no-such-package-anywhere" in capfd.readouterr().err
    assert "no-such-package-anywhere" in setup.LOG.read_text()


def test_pins_cover_what_pyproject_requires() -> None:
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = [*project["dependencies"], *(line for lines in project["optional-dependencies"].values() for line in lines)]
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if "==" in line:
            name, _, version = line.partition("==")
            pinned[name.lower().replace("_", "-")] = version
    for requirement in map(Requirement, listed):
        if requirement.name in ("anyshard", "submitit"):  # itself; not part of the environment
            continue
        assert requirement.name.lower() in pinned, requirement
        assert requirement.specifier.contains(pinned[requirement.name.lower()]), requirement
