"""The tree: links, guards, sizes of files, and what the host side may import."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("configs", "parallel", "offload", "trainer", "launch")
MAX_LINES = 600
HEAVY = ("torch", "deepspeed", "transformers", "datasets", "tokenizers")


def _python(code: str, **options: object) -> subprocess.CompletedProcess[str]:
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, **{"env": environ, **options}
    )


@pytest.mark.parametrize("part", PARTS)
def test_the_package_links_to_the_five_directories(part: str) -> None:
    link = ROOT / "anyshard" / part
    assert link.is_symlink()
    assert os.readlink(link) == f"../{part}"
    assert (ROOT / part).is_dir()


@pytest.mark.parametrize("part", PARTS)
def test_a_bare_name_is_refused(part: str) -> None:
    done = _python(f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {part}")
    assert done.returncode == 1
    assert f"ImportError: '{part}' is part of anyshard: write 'import anyshard.{part}'" in done.stderr


@pytest.mark.parametrize("damage", ["text", "missing"])
def test_a_checkout_that_lost_its_links_is_refused(tmp_path: Path, damage: str) -> None:
    copy = tmp_path / "anyshard"
    shutil.copytree(ROOT / "anyshard", copy, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for part in PARTS:
        (tmp_path / part).symlink_to(ROOT / part)
    (copy / "trainer").unlink()
    if damage == "text":  # what git writes where core.symlinks is false
        (copy / "trainer").write_text("../trainer")
    done = _python("import sys; sys.path.insert(0, '.'); import anyshard", cwd=tmp_path)
    assert done.returncode == 1
    assert "anyshard/trainer is not a directory" in done.stderr
    assert "git config core.symlinks true && git checkout -- anyshard" in done.stderr


def _sources() -> list[Path]:
    folders = (*PARTS, "tests", "tools", "benchmarks", "examples")
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")) if "__pycache__" not in path.parts]


def test_files_stay_readable_in_one_sitting() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in _sources()}
    too_long = {name: length for name, length in lengths.items() if length > MAX_LINES}
    assert not too_long, f"longer than {MAX_LINES} lines, split them: {too_long}"


def _modules(*parts: str) -> list[str]:
    found = [path.relative_to(ROOT).with_suffix("") for part in parts for path in sorted((ROOT / part).rglob("*.py"))]
    names = [".".join(("anyshard", *path.parts)) for path in found if "__pycache__" not in path.parts]
    return [name.removesuffix(".__init__") for name in names]


def test_the_host_side_imports_nothing_heavy() -> None:
    modules = ["anyshard", *_modules("configs", "launch"), "anyshard.offload.op_cache"]
    code = (
        f"import importlib, json, sys\n"
        f"loaded = []\n"
        f"for name in {modules!r}:\n"
        f"    importlib.import_module(name)\n"
        f"    loaded += [(name, heavy) for heavy in {HEAVY!r} if heavy in sys.modules]\n"
        f"print(json.dumps(loaded[:5]))"
    )
    done = _python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", _modules(*PARTS))
def test_every_module_can_be_imported(name: str) -> None:
    assert importlib.import_module(name).__name__ == name


def test_the_public_names_are_documented_and_lazy() -> None:
    done = _python("import sys, anyshard; assert 'torch' not in sys.modules; print(*anyshard.__all__)")
    assert done.stdout.split() == ["Config", "Task", "__version__", "compose", "fit", "plan"]
    import anyshard

    for name in ("Config", "Task", "compose", "fit", "plan"):
        assert getattr(anyshard, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'train'; it has Config"):
        _ = anyshard.train  # type: ignore[attr-defined]
