"""What a probe of this machine found, kept per host and device: the settings of the drive, and the rates that plans use.

`probe.py` measures; this reads and writes the result, and imports no torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from anyshard.offload.derive import Aio

FORMAT = 1
"""Counted up when a probe measures something else: older results are then measured anew."""


@dataclass(frozen=True)
class Rates:
    """Bandwidths and rates of a host, in bytes or elements per second; those of data sheets where nothing was measured.

    Attributes:
        read_bytes_per_s, write_bytes_per_s: of the drive, through DeepSpeed's asynchronous I/O as in `aio`.
        raw_read_bytes_per_s, raw_write_bytes_per_s: of the same file with fio or dd; 0 where neither is here.
        copy_bytes_per_s: from host memory to host memory on one thread.
        adam_elements_per_s: that DeepSpeed's CPU Adam steps on one rank's threads.
        device_copy_bytes_per_s: between host and accelerator; 0 without one.
        measured: whether a probe found them.
    """

    read_bytes_per_s: float = 2e9
    write_bytes_per_s: float = 1e9
    raw_read_bytes_per_s: float = 0.0
    raw_write_bytes_per_s: float = 0.0
    copy_bytes_per_s: float = 5e9
    adam_elements_per_s: float = 2e8
    device_copy_bytes_per_s: float = 0.0
    measured: bool = False
    aio: Aio = field(default_factory=Aio)


def cache_file(drive: Path, environ: Mapping[str, str] = os.environ) -> Path:
    """Where the result of this host and the device under a path is kept."""
    there = next(folder for folder in (drive.absolute(), *drive.absolute().parents) if folder.exists())
    device = os.stat(there).st_dev
    folder = Path(environ.get("ANYSHARD_CACHE") or "~/.cache/anyshard").expanduser() / "probe"
    return folder / f"{socket.gethostname()}-{os.major(device)}-{os.minor(device)}.json"


def load(drive: Path) -> Rates:
    """What was measured here, or the figures of a data sheet."""
    # not there, cut off, or of another version
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AssertionError):
        record = json.loads(cache_file(drive).read_text())
        if record.pop("format") == FORMAT:
            return Rates(**{**record, "aio": Aio(**record["aio"])})
    return Rates()


def store(drive: Path, rates: Rates) -> Path:
    """Keep a result; returns its file."""
    file = cache_file(drive)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps({"format": FORMAT, **dataclasses.asdict(rates)}, indent=1) + "\n")
    partial.replace(file)
    return file
