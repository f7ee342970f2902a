"""What `anyshard doctor` looks at, one small function for each thing; none imports torch.

A check that finds something wrong says what to do about it. "fail" is for what stops every run on this machine, "warn"
for what stops or slows some.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import psutil
from packaging.requirements import Requirement

from anyshard import __version__
from anyshard.launch.env import Hardware, is_port_free
from anyshard.offload import op_cache
from anyshard.trainer.wandb_key import find_key

TESTED = {
    "torch": "2.13.0",
    "deepspeed": "0.19.8",
    "transformers": "5.23.0",
    "hydra-core": "1.3.8",
    "omegaconf": "2.3.1",
    "wandb": "0.31.0",
}
"""Versions that the tests run with; `constraints.txt` pins them."""
GIB = 2**30
ISA_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "sve", "asimd")
DEFAULT_PORT = 29500


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        mark: "ok", "warn" or "fail".
        found: what there is.
        fix: what to do where it is not ok.
    """

    name: str
    mark: str
    found: str
    fix: str = ""


def python_version() -> Check:
    """The interpreter, which pyproject.toml requires to be 3.11 or newer."""
    kind = "virtual environment" if sys.prefix != sys.base_prefix else "no virtual environment"
    return Check("python", "ok", f"{platform.python_version()} at {sys.executable} ({kind}), anyshard {__version__}")


def packages() -> list[Check]:
    """Installed versions against the ranges that anyshard requires and the versions that it is tested with."""
    ranges = {
        requirement.name: requirement for requirement in map(Requirement, requires("anyshard") or []) if not requirement.marker
    }
    return [_package(name, tested, ranges.get(name)) for name, tested in TESTED.items()]


def _package(name: str, tested: str, required: Requirement | None) -> Check:
    try:
        found = version(name)
    except PackageNotFoundError:
        return Check(name, "fail", "not installed", f"{sys.executable} -m pip install '{required or name}'")
    wanted = str(required.specifier) if required else ""
    if required and not required.specifier.contains(found.partition("+")[0], prereleases=True):
        return Check(
            name, "fail", f"{found}, and anyshard needs {wanted}", f"{sys.executable} -m pip install '{name}=={tested}'"
        )
    if found.split(".")[:2] != tested.split(".")[:2]:
        return Check(name, "warn", f"{found}, tested with {tested}", f"if something breaks: pip install '{name}=={tested}'")
    return Check(name, "ok", found)


def processor(hardware: Hardware, cpuinfo: Path = Path("/proc/cpuinfo")) -> Check:
    """Model, usable cores and the instruction sets that DeepSpeed's CPU operators use."""
    fields: dict[str, str] = {}
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    present = [flag for flag in ISA_FLAGS if flag in flags]
    model = fields.get("model name") or platform.processor() or platform.machine()
    found = f"{model}, {hardware.num_cores} cores, {' '.join(present) or 'no vector extensions known'}"
    if present:
        return Check("processor", "ok", found)
    return Check(
        "processor", "warn", found, "offload=cpu steps the optimizer without vector instructions, slowly; use a newer processor"
    )


def memory() -> Check:
    """Host memory."""
    state = psutil.virtual_memory()
    found = f"{state.available / GIB:.1f} GiB available of {state.total / GIB:.1f} GiB"
    if state.available < 2 * GIB:
        return Check("memory", "warn", found, "end other programs: a rank on the CPU takes about 0.5 GiB before any model")
    return Check("memory", "ok", found)


def gpus() -> Check:
    """Names, memory and driver of the NVIDIA GPUs, from NVML."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        if shutil.which("nvidia-smi") is None:
            return Check("gpu", "ok", "none (no NVIDIA driver): runs go to the CPU")
        return Check(
            "gpu",
            "fail",
            f"the NVIDIA driver does not answer: {error}",
            "run nvidia-smi and mend what it says; a reboot may do",
        )
    try:
        driver = str(pynvml.nvmlSystemGetDriverVersion())
        names = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            size_gib = pynvml.nvmlDeviceGetMemoryInfo(handle).total / GIB
            names.append(f"{pynvml.nvmlDeviceGetName(handle)} ({size_gib:.0f} GiB)")
    finally:
        pynvml.nvmlShutdown()
    counted = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    return Check("gpu", "ok", f"{counted or 'none'}; driver {driver}")


def operators(hardware: Hardware) -> list[Check]:
    """DeepSpeed's compiled operators: built, buildable, or what is missing."""
    checks = []
    for entry in op_cache.status():
        name = f"operator {entry.op.name}"
        if entry.op.name == "shm_comm" and hardware.num_gpus:
            checks.append(Check(name, "ok", "not used with GPUs"))
        elif entry.state == "built":
            checks.append(Check(name, "ok", f"built in {op_cache.extensions_dir()}"))
        elif entry.state == "buildable":
            command = f"{sys.executable} -m anyshard.offload.ops build {entry.op.name}"
            late = f"not built; its first use builds it, {op_cache.BUILD_TIME} ({entry.op.used_for})"
            if entry.op.name in op_cache.DEFAULT_OPS:
                checks.append(Check(name, "warn", late, f"build it now: {command}"))
            else:
                checks.append(Check(name, "ok", late))
        else:
            # without it DeepSpeed cannot start a process group on CPUs at all
            mark = "fail" if entry.op.name == "shm_comm" else "warn"
            checks.append(Check(name, mark, f"cannot be built: {entry.reason} Needed for {entry.op.used_for}.", entry.fix))
    return checks


def build_locks() -> Check:
    """Locks left by killed builds, for which every run would wait without end; they are removed."""
    removed = op_cache.remove_stale_locks()
    if removed:
        return Check("build locks", "ok", f"removed {len(removed)} left by killed builds: {', '.join(map(str, removed))}")
    return Check("build locks", "ok", "none stale")


def shared_memory(path: Path = Path("/dev/shm")) -> Check:
    """/dev/shm, through which ranks of one host exchange data."""
    if not path.is_dir():
        return Check(
            "shared memory",
            "warn",
            f"no {path}",
            "ranks of one host exchange data more slowly; in a container mount a tmpfs there",
        )
    usage = psutil.disk_usage(str(path))
    found = f"{usage.free / GIB:.1f} GiB free of {usage.total / GIB:.1f} GiB in {path}"
    if usage.free < GIB:
        return Check(
            "shared memory",
            "warn",
            found,
            "NCCL and data workers can fail: start the container with --shm-size=8g or --ipc=host",
        )
    return Check("shared memory", "ok", found)


def limits() -> list[Check]:
    """Limits of the shell: open files, locked memory, core dumps."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    core = resource.getrlimit(resource.RLIMIT_CORE)[0]
    unlimited = resource.RLIM_INFINITY
    few = files != unlimited and files < 4096
    tight = locked != unlimited and locked < GIB
    return [
        Check("open files", "warn" if few else "ok", _limit(files), "raise it: ulimit -n 65536" if few else ""),
        Check(
            "locked memory",
            "warn" if tight else "ok",
            _limit(locked, "KiB", 1024),
            "InfiniBand and pinned buffers need more: ulimit -l unlimited, in a container --ulimit memlock=-1" if tight else "",
        ),
        Check("core dumps", "ok", _limit(core, "KiB", 1024)),
    ]


def _limit(value: int, unit: str = "", scale: int = 1) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value // scale} {unit}".rstrip()


def disk(name: str, directory: Path, *, wanted_gib: float = 5.0) -> Check:
    """Whether a directory (or where it would be made) can be written to, and the space there."""
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    fix = "choose another place: run.dir=..., data.cache_dir=... or ANYSHARD_CACHE=..."
    try:
        with tempfile.NamedTemporaryFile(dir=existing) as file:
            file.write(bytes(2**20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return Check(name, "fail", f"{directory} cannot be written: {error.strerror}", fix)
    free_gib = psutil.disk_usage(str(existing)).free / GIB
    found = f"{free_gib:.1f} GiB free for {directory}"
    return Check(name, "warn" if free_gib < wanted_gib else "ok", found, fix if free_gib < wanted_gib else "")


def cache_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """Where tokenised data is kept unless `data.cache_dir` says otherwise."""
    return Path(environ.get("ANYSHARD_CACHE") or "~/.cache/anyshard").expanduser()


def wandb_login(environ: Mapping[str, str] = os.environ, home: Path | None = None) -> Check:
    """Whether runs with tracking=wandb go online."""
    mode = environ.get("WANDB_MODE")
    if mode in ("offline", "disabled", "dryrun"):
        return Check("wandb", "ok", f"{mode} by WANDB_MODE")
    key = find_key(environ, home)
    if key.problem:
        return Check("wandb", "warn", f"{key.problem}: tracking=wandb writes offline runs", "mend it, or set WANDB_API_KEY")
    if key.source:
        return Check("wandb", "ok", f"online: key in {key.source}")
    return Check("wandb", "ok", "no key: tracking=wandb writes offline runs ('wandb login' changes that)")


def hugging_face(environ: Mapping[str, str] = os.environ) -> Check:
    """The cache of models and datasets, and whether the hub is asked."""
    home = Path(environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    offline = [
        name
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
        if environ.get(name, "0") not in ("", "0")
    ]
    token = bool(environ.get("HF_TOKEN")) or (home / "token").exists()
    models = len(list((home / "hub").glob("models--*")))
    parts = [
        f"cache {home} ({models} models)",
        f"offline by {', '.join(offline)}" if offline else "online",
        "with a token" if token else "no token",
    ]
    return Check("hugging face", "ok", ", ".join(parts))


def port(number: int = DEFAULT_PORT) -> Check:
    """The port that launchers take where none is given; `launch=local` takes a free one itself."""
    if is_port_free(number):
        return Check("port", "ok", f"{number} is free")
    return Check("port", "warn", f"{number} is taken", "launch=local takes a free port by itself; elsewhere set launch.port")
