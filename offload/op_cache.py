"""DeepSpeed's compiled operators on disk: which a run needs, where they are, and the locks that builds leave behind.

DeepSpeed compiles an operator at its first use, on every rank at once, while a lock file keeps all but one waiting. A
build that is killed leaves its lock, and every later run waits for it without end. So operators are built once, up
front (`ops.py`), and stale locks are found and removed before ranks start. Nothing here imports torch.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import psutil

from anyshard.configs import schema

NETWORK_FILESYSTEMS = ("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "fuse", "9p", "wekafs")
REMOTE_LOCK_AGE_S = 1800.0
"""No build takes this long: an older lock is stale even where its owner could be on another machine."""


@dataclass(frozen=True)
class Op:
    """One of DeepSpeed's compiled operators.

    Attributes:
        name: ours, as shown and chosen.
        library: its folder and shared object in the extensions directory.
        builder: the class of `deepspeed.ops.op_builder` that compiles it.
        used_for: what needs it.
    """

    name: str
    library: str
    builder: str
    used_for: str


OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op("shm_comm", "deepspeed_shm_comm", "ShareMemCommBuilder", "collectives between ranks on CPUs"),
        Op("cpu_adam", "cpu_adam", "CPUAdamBuilder", "optimizer=adamw with offload=cpu"),
        Op("cpu_lion", "cpu_lion", "CPULionBuilder", "optimizer=lion with offload=cpu"),
        Op("async_io", "async_io", "AsyncIOBuilder", "offload=nvme"),
    )
}
BUILD_TIME = "one to three minutes"
"""What the compilation of one takes on two cores."""
DEFAULT_OPS = ("shm_comm", "cpu_adam", "cpu_lion")
"""Operators that `make setup` builds, beside async_io where libaio is there."""
_CPU_OPTIMIZERS = {"adamw": "cpu_adam", "lion": "cpu_lion"}


@dataclass(frozen=True)
class OpStatus:
    """State of one operator: "built", "buildable" (at its first use), or "missing" what `reason` says and `fix` mends."""

    op: Op
    state: str
    reason: str = ""
    fix: str = ""


def extensions_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Where operators are built: $TORCH_EXTENSIONS_DIR, else inside the virtual environment, else in the user's cache.

    Inside the environment, because a built operator fits one Python and one torch.
    """
    if configured := environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(configured)
    inside = Path(sys.prefix) / "torch_extensions"
    if sys.prefix != sys.base_prefix and os.access(inside if inside.exists() else inside.parent, os.W_OK):
        return inside
    cache = Path(environ.get("ANYSHARD_CACHE") or "~/.cache/anyshard").expanduser()
    return cache / f"torch_extensions-py{sys.version_info.major}{sys.version_info.minor}"


def op_env(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables that a process which loads operators needs: their folder, and a PATH on which torch finds ninja."""
    scripts = str(Path(sys.executable).parent)
    path = environ.get("PATH", os.defpath).split(os.pathsep)
    return {
        "TORCH_EXTENSIONS_DIR": str(extensions_dir(environ)),
        "PATH": os.pathsep.join(path if scripts in path else [scripts, *path]),
    }


def needed_ops(config: schema.Config, accelerator: str) -> list[str]:
    """Operators that a run of this configuration loads.

    Args:
        accelerator: "cpu" or "cuda".

    Source: deepspeed 0.19.8 comm/torch.py:47 (`build_shm_op`, on CPU at every init), ops/adam/cpu_adam.py:93,
    ops/lion/cpu_lion.py.
    """
    names = ["shm_comm"] if accelerator == "cpu" else []
    if config.offload.optimizer is not schema.Device.none and config.optimizer.name in _CPU_OPTIMIZERS:
        names.append(_CPU_OPTIMIZERS[config.optimizer.name])
    if schema.Device.nvme in (config.offload.optimizer, config.offload.param):
        names.append("async_io")
    return names


def status(names: Sequence[str] = tuple(OPS), directory: Path | None = None) -> list[OpStatus]:
    """Whether each operator is built, can be built here, or what is missing for that."""
    directory = directory or extensions_dir()
    return [_status(OPS[name], directory) for name in names]


def _status(op: Op, directory: Path) -> OpStatus:
    if _is_built(op, directory):
        return OpStatus(op, "built")
    lack = missing(op)
    return OpStatus(op, "missing", *lack) if lack else OpStatus(op, "buildable")


def _is_built(op: Op, directory: Path) -> bool:
    """Its library is there and newer than the torch and DeepSpeed it was compiled against (ninja's own rule)."""
    library = directory / op.library / f"{op.library}.so"
    if not library.exists():
        return False
    return library.stat().st_mtime >= max(_installed_at(name) for name in ("torch", "deepspeed"))


def _installed_at(package: str) -> float:
    try:
        return Path(str(distribution(package).locate_file(f"{package}/__init__.py"))).stat().st_mtime
    except (PackageNotFoundError, OSError):
        return 0.0


def missing(op: Op, environ: Mapping[str, str] = os.environ) -> tuple[str, str] | None:
    """What the build of an operator lacks on this machine and the command that brings it, or None.

    Returns:
        (reason, fix), both sentences.
    """
    path = op_env(environ)["PATH"]
    compiler = shutil.which(environ.get("CXX") or "c++", path=path)
    if compiler is None:
        return (
            f"no C++ compiler ({environ.get('CXX') or 'c++'}) is on PATH.",
            "Install one: apt-get install -y g++ (Debian, Ubuntu) or dnf install -y gcc-c++.",
        )
    if shutil.which("ninja", path=path) is None:
        return "ninja is not installed.", f"Install it: {sys.executable} -m pip install ninja."
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        fix = "Install them: apt-get install -y python3-dev or dnf install -y python3-devel."
        return "the headers of Python are not installed.", fix
    if op.name == "async_io" and not _has_header(compiler, "libaio.h"):
        return "libaio is not installed.", "Install it: apt-get install -y libaio-dev or dnf install -y libaio-devel."
    return None


def _has_header(compiler: str, header: str) -> bool:
    command = [compiler, "-E", "-x", "c++", "-include", header, os.devnull]
    return subprocess.run(command, capture_output=True, check=False, timeout=60).returncode == 0


def stale_locks(directory: Path | None = None) -> list[Path]:
    """Lock files in the extensions directory that no build holds any more.

    torch's FileBaton creates `<operator>/lock` and keeps it open until it removes it. A lock is therefore live exactly
    while some process has the file open; the kernel closes it when the process dies, however it dies. On a network
    file system the process may be on another machine: there a lock is stale only after half an hour as well.

    Source: torch 2.13.0 utils/file_baton.py, utils/cpp_extension.py:2345.
    """
    directory = directory or extensions_dir()
    locks = sorted(directory.glob("*/lock"))
    if not locks:
        return []
    held = _open_files()
    shared = _on_network(directory)
    return [lock for lock in locks if lock.resolve() not in held and (not shared or _age_s(lock) > REMOTE_LOCK_AGE_S)]


def remove_stale_locks(directory: Path | None = None) -> list[Path]:
    """Remove the locks that no build holds, and return them."""
    removed = stale_locks(directory)
    for lock in removed:
        lock.unlink(missing_ok=True)
    return removed


def _open_files() -> set[Path]:
    held: set[Path] = set()
    for process in psutil.process_iter():
        try:
            held.update(Path(file.path) for file in process.open_files())
        except psutil.Error:  # it ended, or belongs to someone else
            continue
    return held


def _on_network(directory: Path) -> bool:
    mounts = [part for part in psutil.disk_partitions(all=True) if directory.resolve().is_relative_to(part.mountpoint)]
    return bool(mounts) and max(mounts, key=lambda part: len(part.mountpoint)).fstype.startswith(NETWORK_FILESYSTEMS)


def _age_s(file: Path) -> float:
    try:
        return time.time() - file.stat().st_mtime
    except FileNotFoundError:  # released just now
        return 0.0
