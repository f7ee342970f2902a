"""Build the wheel, install it into a fresh environment, and run the tests from another folder, without this checkout.

The fresh environment sees the third-party packages of `.venv/` through a .pth file, so nothing is downloaded; anyshard
itself must come from the wheel. `make test` runs it, with the interpreter of `.venv/`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("tests/unit", "tests/golden", "tests/conformance")
FROM_WHEEL = "import anyshard, pathlib, sys; sys.exit(not pathlib.Path(anyshard.__file__).is_relative_to(sys.prefix))"


def main() -> int:
    """Returns the exit code of the first command that fails, 0 when none does."""
    with tempfile.TemporaryDirectory(prefix="anyshard-wheel-") as name:
        folder = Path(name)
        sources = copy_sources(folder / "sources")
        run(
            [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder / "dist"), str(sources)], folder
        )
        wheel = next((folder / "dist").glob("*.whl"))
        run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], folder)
        python = folder / "venv" / "bin" / "python"
        site = Path(
            subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True).strip()
        )
        # a path in a .pth file is searched, but the .pth files in it are not read: the editable anyshard stays unseen
        (site / "packages-of-the-checkout.pth").write_text(sysconfig.get_path("purelib") + "\n")
        run([str(python), "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--ignore-installed", str(wheel)], folder)
        elsewhere = folder / "elsewhere"
        elsewhere.mkdir()
        shutil.copy(ROOT / "pyproject.toml", elsewhere)
        shutil.copytree(ROOT / "tests", elsewhere / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        run([str(python), "-c", FROM_WHEEL], elsewhere)
        run([str(folder / "venv" / "bin" / "anyshard"), "--help"], elsewhere, quiet=True)
        present = [path for path in TESTS if (elsewhere / path).is_dir()]
        select = ["-m", "not slow and not dist and not e2e and not gpu"]
        run([str(python), "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", *select, *present], elsewhere)
    return 0


def copy_sources(target: Path) -> Path:
    """What a wheel is built from, away from the checkout, where setuptools would leave build/ and take from it later."""
    for part in ("anyshard", "configs", "launch", "offload", "parallel", "trainer"):
        shutil.copytree(ROOT / part, target / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    return target


def run(command: list[str], folder: Path, *, quiet: bool = False) -> None:
    """One command, shown, in a folder; ends this program when it fails."""
    print(f"    $ {' '.join(command)}", flush=True)
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=folder, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL if quiet else None, check=False
    )
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    sys.exit(main())
