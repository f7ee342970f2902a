"""`anyshard doctor`: is this machine fit to train, and what to do where it is not.

What needs torch runs in child processes: `anyshard.parallel.torch_report` and, under `--dist`,
`anyshard.parallel.collective_check` on every rank.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from anyshard.configs.errors import EXIT_DONE, EXIT_ENVIRONMENT
from anyshard.launch import checks
from anyshard.launch.checks import Check
from anyshard.launch.env import Hardware, find_hardware
from anyshard.offload.op_cache import op_env

REPORT_TIMEOUT_S = 120.0
DIST_TIMEOUT_S = 300.0
PROBE_TIMEOUT_S = 600.0


def doctor(*, dist: bool = False, as_json: bool = False, nproc: int | None = None, probe: Path | None = None) -> int:
    """Look at everything, print it, and return the exit code: 0, or 3 when something that every run needs is broken.

    Args:
        dist: run a collective on all ranks of this host too.
        nproc: ranks of `dist`; None is one per GPU, or two.
        probe: a folder on the drive to measure, with host memory and CPU Adam; the result is kept for plans and runs.
    """
    hardware = find_hardware()
    torch_report = _start([sys.executable, "-m", "anyshard.parallel.torch_report"], hardware)  # runs beside the checks
    found = _local_checks(hardware)
    found.insert(2, torch_check(_finish(torch_report, REPORT_TIMEOUT_S), hardware))
    if dist:
        found.append(_collective(nproc or hardware.num_gpus or 2, hardware))
    if probe is not None:
        command = [sys.executable, "-m", "anyshard.offload.probe", str(probe)]
        found.append(probe_result(_finish(_start(command, hardware), PROBE_TIMEOUT_S), probe))
    failed = any(check.mark == "fail" for check in found)
    if as_json:
        print(json.dumps({"ok": not failed, "checks": [asdict(check) for check in found]}, indent=2))
    else:
        _show(found)
    return EXIT_ENVIRONMENT if failed else EXIT_DONE


def _local_checks(hardware: Hardware) -> list[Check]:
    return [
        checks.python_version(),
        checks.gpus(),
        checks.processor(hardware),
        checks.memory(),
        *checks.packages(),
        checks.build_locks(),
        *checks.operators(hardware),
        checks.shared_memory(),
        *checks.limits(),
        checks.disk("run directory", Path.cwd() / "runs"),
        checks.disk("cache directory", checks.cache_directory()),
        checks.wandb_login(),
        checks.hugging_face(),
        checks.port(),
    ]


def _start(command: Sequence[str], hardware: Hardware) -> subprocess.Popen[str]:
    environ = {**os.environ, **op_env(), "OMP_NUM_THREADS": "1"}
    if hardware.num_gpus == 0:
        environ["DS_ACCELERATOR"] = "cpu"
    return subprocess.Popen(
        command,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _finish(process: subprocess.Popen[str], timeout_s: float) -> dict[str, Any]:
    """The JSON that the child printed on its last line, or {"error": ...}."""
    try:
        out, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks
        try:
            process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        return {"error": f"no answer within {timeout_s:.0f} s"}
    lines = [line for line in out.splitlines() if line.startswith("{")]
    if process.returncode or not lines:
        last = [line for line in errors.splitlines() if line.strip()][-1:]
        return {"error": " ".join(last) or f"exit code {process.returncode}"}
    report: dict[str, Any] = json.loads(lines[-1])
    return report


def torch_check(report: dict[str, Any], hardware: Hardware) -> Check:
    """Whether torch starts and sees the GPUs that the driver shows."""
    if "error" in report:
        return Check(
            "torch devices", "fail", f"torch does not start: {report['error']}", "install it again: make setup SETUP_FORCE=1"
        )
    build = f"CUDA {report['cuda']}" if report["cuda"] else "CPU build"
    found = f"{build}, {report['num_devices']} GPU(s) seen, {report['num_threads']} thread(s)"
    if hardware.num_gpus and not report["cuda"]:
        return Check(
            "torch devices",
            "fail",
            f"{found}, but this host has GPUs",
            "install the CUDA build of torch: make setup SETUP_FORCE=1",
        )
    if hardware.num_gpus > report["num_devices"]:
        return Check(
            "torch devices", "fail", found, "the driver is too old for this build of torch, or CUDA_VISIBLE_DEVICES hides GPUs"
        )
    return Check("torch devices", "ok", found)


def _collective(num_ranks: int, hardware: Hardware) -> Check:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    report = _finish(_start([*torchrun, "-m", "anyshard.parallel.collective_check"], hardware), DIST_TIMEOUT_S)
    return collective_result(report, num_ranks)


def collective_result(report: dict[str, Any], num_ranks: int) -> Check:
    """The check that says how the all-reduce of `--dist` went."""
    name = f"all-reduce on {num_ranks} ranks"
    if "error" in report:
        fix = "see 'A run hangs' in docs/debugging.md; on GPUs run again with NCCL_DEBUG=INFO"
        return Check(name, "fail", report["error"], fix)
    small, large = report["latency_us"], report["bus_gb_per_s"]
    return Check(name, "ok", f"{report['backend']}: {small:.0f} us for 8 bytes, {large:.2f} GB/s bus bandwidth at 64 MiB")


def probe_result(report: dict[str, Any], drive: Path) -> Check:
    """The check that says what the probe of `--probe` found."""
    name = f"probe of {drive}"
    if "error" in report:
        return Check(name, "fail", report["error"], "docs/offload.md says what a drive must do; name another with --probe")
    rates = {kind: report[f"{kind}_bytes_per_s"] / 1e9 for kind in ("read", "write", "raw_read", "raw_write", "copy")}
    aio = report["aio"]
    found = (
        f"read {rates['read']:.2f} GB/s, write {rates['write']:.2f} GB/s (raw {rates['raw_read']:.2f} and "
        f"{rates['raw_write']:.2f}) with blocks of {aio['block_bytes'] // 1024} KiB, depth {aio['queue_depth']}, "
        f"{aio['threads']} thread(s); host memory {rates['copy']:.1f} GB/s; "
        f"CPU Adam {report['adam_elements_per_s'] / 1e6:.0f} M elements/s; kept in {report['file']}"
    )
    return Check(name, "ok", found)


def _show(found: Sequence[Check]) -> None:
    """A table on a terminal, plain lines elsewhere; what is not ok says what to do."""
    if not sys.stdout.isatty():
        for check in found:
            print(f"[{check.mark:4}] {check.name}: {check.found}" + (f"\n       -> {check.fix}" if check.fix else ""))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colors = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(width=4)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in found:
        text = Text(check.found)
        if check.fix:
            text.append(f"\n-> {check.fix}", style=colors[check.mark])
        table.add_row(Text(check.mark, style=colors[check.mark]), Text(check.name), text)
    Console().print(table)
