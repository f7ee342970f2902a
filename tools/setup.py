"""Make `.venv/`: everything that developing, training and testing need, with DeepSpeed's operators built into it.

`make setup` runs it with any Python 3.11 or newer; nothing but the standard library is used. Doing it twice does nothing
twice: a stamp in `.venv/` holds what it was made from. Environment variables:

    TORCH_INDEX    package index of another torch build, e.g. of CPU wheels for a machine without a GPU
    SETUP_FORCE=1  start over from nothing
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "setup-stamp.json"
LOG = VENV / "setup.log"
INPUTS = ("pyproject.toml", "constraints.txt", "tools/setup.py")
START = time.monotonic()


def main() -> int:
    """Run all stages that are not done; returns the exit code."""
    if sys.version_info < (3, 11):  # noqa: UP036  (whatever Python is at hand runs this file)
        version = sys.version.split()[0]
        return fail(f"Python 3.11 or newer is needed and {sys.executable} is {version}: name another, make setup PYTHON=...")
    if Path(sys.prefix) == VENV:  # an activated environment must not take itself apart
        os.execv(sys._base_executable, [sys._base_executable, *sys.argv])  # type: ignore[attr-defined]
    wanted = fingerprint()
    if os.environ.get("SETUP_FORCE") == "1":
        STAMP.unlink(missing_ok=True)
    if read_stamp() == wanted and PYTHON.exists():
        say(f"{VENV} is up to date (SETUP_FORCE=1 makes it again)")
        return 0
    problem = system_packages()
    if problem:
        return fail(problem)
    make_venv()
    if not install_packages():
        return fail(f"the packages were not installed; the whole output is in {LOG}")
    if not build_operators():
        return fail("DeepSpeed's operators were not built: see above")
    STAMP.write_text(json.dumps(wanted, indent=1) + "\n")
    say(f"{VENV} is ready after {time.monotonic() - START:.0f} s")
    return 0


def say(line: str) -> None:
    """One line about what happens now."""
    print(f"setup: {line}", flush=True)


def fail(line: str) -> int:
    """Say why nothing more can be done; returns the exit code of a wrong environment."""
    print(f"setup: error: {line}", file=sys.stderr, flush=True)
    return 3


def fingerprint() -> dict[str, str]:
    """What the environment is made from: it is made again when any of it changes."""
    contents = b"\0".join((ROOT / name).read_bytes() for name in INPUTS)
    return {
        "inputs": hashlib.sha256(contents).hexdigest(),
        "place": str(VENV),  # scripts in .venv/bin hold it, so a moved clone needs new ones
        "python": sys.version.split()[0],
        "torch_index": os.environ.get("TORCH_INDEX", ""),
        "gpu": str(has_gpu()),
    }


def read_stamp() -> dict[str, str]:
    """The fingerprint that the environment was made from, empty when there is none."""
    try:
        stamp: dict[str, str] = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}
    return stamp


def has_gpu() -> bool:
    """Whether an NVIDIA GPU answers."""
    command = ["nvidia-smi", "-L"]
    return shutil.which(command[0]) is not None and subprocess.run(command, capture_output=True, check=False).returncode == 0


def system_packages() -> str | None:
    """Install the system packages that are missing where we may; returns what is needed and could not be had."""
    needed = {
        "g++": shutil.which(os.environ.get("CXX") or "c++") is not None,
        "python3-venv": _has_module("ensurepip"),
        "python3-dev": (Path(sysconfig.get_paths()["include"]) / "Python.h").exists(),
    }
    wished = {"libaio-dev": Path("/usr/include/libaio.h").exists()}
    lacking = [name for name, there in {**needed, **wished}.items() if not there]
    if not lacking:
        return None
    command = f"apt-get install -y {' '.join(lacking)}"
    if shutil.which("apt-get") and os.geteuid() == 0:
        say(f"installing system packages: {command}")
        quiet = {"stdout": subprocess.DEVNULL, "stdin": subprocess.DEVNULL, "check": False}
        environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "update", "-qq"], env=environ, **quiet)  # type: ignore[call-overload]
        done = subprocess.run(["apt-get", "install", "-y", "-qq", *lacking], env=environ, **quiet)  # type: ignore[call-overload]
        if done.returncode == 0:
            return None
    if any(name in needed for name in lacking):
        return f"system packages are missing ({', '.join(lacking)}). Install them: sudo {command}"
    say(f"without libaio offload=nvme will not work; to have it: sudo {command}")
    return None


def _has_module(name: str) -> bool:
    try:
        __import__(name)
    except ImportError:
        return False
    return True


def make_venv() -> None:
    """A new environment, unless one that was made here from the same Python is there to be completed."""
    old = read_stamp()
    same = not old or (old.get("place") == str(VENV) and old.get("python") == sys.version.split()[0])
    if PYTHON.exists() and same and os.environ.get("SETUP_FORCE") != "1" and _runs_here():
        say(f"completing {VENV}")
        return
    say(f"making {VENV} with Python {sys.version.split()[0]}")
    if VENV.exists():
        shutil.rmtree(VENV)
    subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True, stdin=subprocess.DEVNULL)


def _runs_here() -> bool:
    """Whether the environment was made at this path: a moved one still runs but its scripts point to the old place."""
    pip = VENV / "bin" / "pip"
    return pip.exists() and pip.read_text().startswith(f"#!{VENV}/")


def install_packages() -> bool:
    """The pinned packages, torch first: which of its builds fits depends on the machine."""
    pins = (ROOT / "constraints.txt").read_text()
    found = re.search(r"^torch==(\S+)", pins, re.MULTILINE)
    assert found, "constraints.txt pins torch"
    torch, index = f"torch=={found[1]}", os.environ.get("TORCH_INDEX")
    kind = f"from {index}" if index else "with CUDA" if has_gpu() else "for the CPU where the index has such a build"
    constraints = ["-c", str(ROOT / "constraints.txt")]
    return pip(f"{torch} {kind}", [torch, *(["--index-url", index] if index else constraints)]) and pip(
        "all other packages, and anyshard itself as an editable package", [*constraints, "-e", f"{ROOT}[dev]"]
    )


def pip(what: str, arguments: list[str]) -> bool:
    """Install with pip, its output to the log; the end of it is shown when it fails."""
    say(f"installing {what} ...")
    start = time.monotonic()
    command = [str(PYTHON), "-m", "pip", "install", "--no-input", "--progress-bar", "off", *arguments]
    with LOG.open("a+") as log:
        begin = log.tell()
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=ROOT, check=False)
        log.seek(begin)
        lines = log.read().splitlines()
    if done.returncode:
        print("\n".join(lines[-15:]), file=sys.stderr)
        return False
    say(f"installed in {time.monotonic() - start:.0f} s")
    return True


def build_operators() -> bool:
    """DeepSpeed's operators, one after another, into the environment; async_io too where libaio is there."""
    say("building DeepSpeed's operators, once")
    environ = {**os.environ, "DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(VENV / "torch_extensions")}
    command = [str(PYTHON), "-m", "anyshard.offload.ops", "build"]
    return subprocess.run(command, env=environ, stdin=subprocess.DEVNULL, cwd=ROOT, check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
