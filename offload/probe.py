"""`python -m anyshard.offload.probe DRIVE`: measure the drive, host memory and CPU Adam of this machine, once.

The drive is measured through DeepSpeed's own asynchronous I/O, as training will use it, over block sizes, depths and threads,
and beside fio or dd on the same file. `anyshard doctor --probe` calls this in a process of its own; plans and ranks read what
it stores (`measured.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from anyshard.configs.errors import EnvError
from anyshard.offload import measured
from anyshard.offload.derive import MIB, Aio
from anyshard.offload.measured import Rates
from anyshard.offload.ops import build, cpu_optimizer
from anyshard.offload.swap_space import SwapSpace

FILE_BYTES = 256 * MIB
CANDIDATES = [Aio(block, depth, threads) for block in (MIB // 4, MIB) for depth in (8, 32) for threads in (1, 2)]
ADAM_ELEMENTS = 4_000_000
REPEATS = 3


def probe(drive: Path, say: Callable[[str], None] = print) -> Rates:
    """Measure everything; takes about half a minute, and `FILE_BYTES` on the drive.

    Raises:
        EnvError: the drive cannot be used, or DeepSpeed's operator not be built.
    """
    build(["async_io", "cpu_adam"], say)
    with SwapSpace.claim(str(drive), run=Path("probe"), rank=os.getpid(), key="the drive") as space:
        file = space.folder / "probe.swp"
        space.reserve({file: FILE_BYTES})
        found = []
        for aio in CANDIDATES:
            read, write = aio_rates(file, aio)
            found.append((read, write, aio))
            say(
                f"block {aio.block_bytes // 1024:5} KiB, depth {aio.queue_depth:3}, threads {aio.threads}: "
                f"read {read / 1e9:.2f} GB/s, write {write / 1e9:.2f} GB/s"
            )
        read, write, aio = best(found)
        raw_read, raw_write = raw_rates(file, aio)
    return Rates(
        read_bytes_per_s=read,
        write_bytes_per_s=write,
        raw_read_bytes_per_s=raw_read,
        raw_write_bytes_per_s=raw_write,
        copy_bytes_per_s=copy_rate(),
        adam_elements_per_s=adam_rate(),
        device_copy_bytes_per_s=device_rate(),
        measured=True,
        aio=aio,
    )


def best(found: list[tuple[float, float, Aio]]) -> tuple[float, float, Aio]:
    """The settings with which a byte is read and written in the least time; the plainest of those within 3 %."""
    times = [1 / read + 1 / write for read, write, _ in found]
    near = [entry for entry, time_s in zip(found, times, strict=True) if time_s <= 1.03 * min(times)]
    return min(near, key=lambda entry: (entry[2].threads, entry[2].queue_depth, entry[2].block_bytes))


def aio_rates(file: Path, aio: Aio, *, num_bytes: int = FILE_BYTES, repeats: int = REPEATS) -> tuple[float, float]:
    """Bytes per second of reading and of writing a file that has its blocks, the best of some tries."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    handle: Any = AsyncIOBuilder().load(verbose=False).aio_handle(aio.block_bytes, aio.queue_depth, False, True, aio.threads)
    buffer = handle.new_cpu_locked_tensor(num_bytes, torch.zeros(1, dtype=torch.uint8)).zero_()
    try:
        write = best_rate(lambda: handle.sync_pwrite(buffer, str(file), 0), num_bytes, repeats)
        read = best_rate(lambda: handle.sync_pread(buffer, str(file), 0), num_bytes, repeats)
    finally:
        handle.free_cpu_locked_tensor(buffer)
    return read, write


def best_rate(work: Callable[[], object], amount: float, repeats: int = REPEATS) -> float:
    """`amount` a second in the fastest of some tries."""
    least = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        least = min(least, time.perf_counter() - start)
    return amount / least


def raw_rates(file: Path, aio: Aio) -> tuple[float, float]:
    """The same with fio at the same depth, or with dd where there is no fio; 0 where there is neither."""
    if shutil.which("fio"):
        return _fio(file, "read", aio), _fio(file, "write", aio)
    if shutil.which("dd"):
        blocks = FILE_BYTES // aio.block_bytes
        sizes = [f"bs={aio.block_bytes}", f"count={blocks}", "status=none"]
        read = ["dd", f"if={file}", "of=/dev/null", "iflag=direct", *sizes]
        write = ["dd", "if=/dev/zero", f"of={file}", "oflag=direct", "conv=notrunc", *sizes]
        return tuple(best_rate(lambda c=c: subprocess.run(c, check=True), FILE_BYTES) for c in (read, write))  # type: ignore[misc, return-value]
    return 0.0, 0.0


def _fio(file: Path, kind: str, aio: Aio) -> float:
    command = ["fio", "--name=probe", f"--filename={file}", f"--rw={kind}", f"--bs={aio.block_bytes}", "--direct=1"]
    command += [
        "--ioengine=libaio",
        f"--iodepth={aio.queue_depth}",
        f"--size={FILE_BYTES}",
        "--loops=3",
        "--output-format=json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    return float(job[kind]["bw_bytes"])


def copy_rate(num_bytes: int = 128 * MIB) -> float:
    """Bytes per second of copying host memory on this process's threads."""
    source, target = torch.ones(num_bytes, dtype=torch.uint8), torch.zeros(num_bytes, dtype=torch.uint8)
    return best_rate(lambda: target.copy_(source), num_bytes)


def adam_rate(num_elements: int = ADAM_ELEMENTS) -> float:
    """Elements per second of DeepSpeed's CPU Adam."""
    param = torch.nn.Parameter(torch.ones(num_elements))
    param.grad = torch.full_like(param, 1e-3)
    optimizer = cpu_optimizer("adamw")([param], adamw_mode=True)
    optimizer.step()  # makes the states
    return best_rate(optimizer.step, num_elements)


def device_rate(num_bytes: int = 128 * MIB) -> float:
    """Bytes per second from page-locked host memory to the accelerator; 0 without one."""
    if not torch.cuda.is_available():
        return 0.0
    source = torch.ones(num_bytes, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(source, device="cuda")

    def copy() -> None:
        target.copy_(source)
        torch.cuda.synchronize()

    return best_rate(copy, num_bytes)


def main() -> int:
    """Measure, keep the result, and print it as one line of JSON; progress goes to standard error."""
    parser = argparse.ArgumentParser(prog="python -m anyshard.offload.probe", description="Measure a drive and this host.")
    parser.add_argument("drive", type=Path)
    drive: Path = parser.parse_args().drive
    try:
        rates = probe(drive, lambda line: print(line, file=sys.stderr, flush=True))
    except EnvError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps({"file": str(measured.store(drive, rates)), **rates.__dict__, "aio": rates.aio.__dict__}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
