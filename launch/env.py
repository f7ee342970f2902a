"""What this host has, found without importing torch, and the environment that ranks are given."""

from __future__ import annotations

import contextlib
import math
import os
import socket
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import psutil

_UNLIMITED = 2**60
"""Version 1 of control groups writes the largest number of pages for no limit."""


@dataclass(frozen=True)
class Hardware:
    """Accelerators and memory of this host."""

    num_gpus: int
    gpu_name: str | None
    gpu_memory_gib: float | None
    host_memory_gib: float
    num_cores: int


@lru_cache(maxsize=1)
def find_hardware() -> Hardware:
    """Look at this host: GPUs through NVML (CUDA_VISIBLE_DEVICES is honoured), memory and cores through psutil."""
    names, sizes = _find_gpus()
    return Hardware(
        num_gpus=len(names),
        gpu_name=names[0] if names else None,
        gpu_memory_gib=min(sizes) if sizes else None,
        host_memory_gib=min(psutil.virtual_memory().total, memory_limit_bytes() or math.inf) / 2**30,
        num_cores=len(os.sched_getaffinity(0)),
    )


def memory_limit_bytes(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a control group (of a container, a batch system or systemd) lets this process have; None for no limit.

    The limits of all groups on the way to the root hold. Both versions of control groups are looked at.
    """
    limits = []
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory") and "memory" not in controllers.split(","):
            continue
        top, name = (root, "memory.max") if not controllers else (root / "memory", "memory.limit_in_bytes")
        place = top / path.lstrip("/")
        for folder in (place, *place.parents):
            with contextlib.suppress(OSError, ValueError):  # none here, or "max"
                limits.append(int((folder / name).read_text()))
            if folder == top:
                break
    least = min(limits, default=_UNLIMITED)
    return None if least >= _UNLIMITED else least


def _find_gpus() -> tuple[list[str], list[float]]:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return [], []  # no driver on this host
    handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in _visible(pynvml.nvmlDeviceGetCount())]
    names = [str(pynvml.nvmlDeviceGetName(handle)) for handle in handles]
    return names, [pynvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30 for handle in handles]


def _visible(count: int) -> list[int]:
    """Indices of the GPUs that CUDA shows: those that CUDA_VISIBLE_DEVICES lists up to the first that is none.

    A GPU that is named there by its UUID counts; which one it is matters to nobody here.
    """
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return list(range(count))
    found: list[int] = []
    for part in (part.strip() for part in listed.split(",")):
        index = int(part) if part.isdecimal() else len(found) if part.startswith(("GPU-", "MIG-")) else -1
        if not 0 <= index < count:
            break
        found.append(index)
    return found


def is_port_free(port: int) -> bool:
    """Whether nothing listens on this TCP port here."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
