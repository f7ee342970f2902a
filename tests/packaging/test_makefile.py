"""The targets of the Makefile that do more than call one command."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.mark.parametrize(("codes", "worst"), [((0, 0, 0), 0), ((3, 0, 1), 3), ((0, 1, 4), 4)])
def test_bench_runs_every_benchmark_and_fails_with_the_worst(codes: tuple[int, ...], worst: int, tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    (tmp_path / "benchmarks").mkdir()
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copy(ROOT / "tools" / "stage", tmp_path / "tools")
    (tmp_path / "tools" / "setup.py").touch()  # the environment is that of this test
    for name, code in zip("abc", codes, strict=True):
        (tmp_path / "benchmarks" / f"bench_{name}.py").write_text(f"print('measured {name}'); raise SystemExit({code})\n")
    done = subprocess.run(["make", "bench"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert [f"measured {name}" in done.stdout for name in "abc"] == [True] * 3
    assert done.returncode == (2 if worst else 0), done.stderr  # make's own code for a target that failed
    assert (f"Error {worst}" in done.stderr) == bool(worst)
