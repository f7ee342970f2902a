"""The wheel holds every module, YAML file and template of the five directories, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("configs", "parallel", "offload", "trainer", "launch")
SUFFIXES = (".py", ".yaml", ".j2", ".typed")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"  # setuptools writes build/ beside what it builds
    for part in (*PARTS, "anyshard"):
        shutil.copytree(ROOT / part, sources / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(folder), str(sources)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return zipfile.ZipFile(next(folder.glob("anyshard-*.whl")))


def test_every_source_file_is_inside(wheel: zipfile.ZipFile) -> None:
    inside = {name for name in wheel.namelist() if name.startswith("anyshard/")}
    sources = {
        f"anyshard/{path.relative_to(ROOT).as_posix()}"
        for part in PARTS
        for path in (ROOT / part).rglob("*")
        if path.suffix in SUFFIXES and "__pycache__" not in path.parts
    }
    assert inside == sources | {"anyshard/__init__.py", "anyshard/__main__.py", "anyshard/py.typed"}


def test_metadata_names_the_command_the_license_and_the_extras(wheel: zipfile.ZipFile) -> None:
    read = {name.rpartition("/")[2]: wheel.read(name).decode() for name in wheel.namelist() if ".dist-info/" in name}
    assert "anyshard = anyshard.launch.cli:main" in read["entry_points.txt"]
    assert "Apache License" in read["LICENSE"]
    for extra in ("hf", "slurm", "plot", "dev"):
        assert f"Provides-Extra: {extra}" in read["METADATA"]
    assert "Requires-Python: >=3.11" in read["METADATA"]
