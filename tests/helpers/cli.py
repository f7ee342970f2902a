"""The `anyshard` command as a person runs it: a process of its own in a folder of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "-m", "anyshard"]
SMOKE = ["debug=smoke", "launch.procs_per_node=2"]


def environment(**extra: str) -> dict[str, str]:
    """What a command inherits here: no GPU, operators of this environment, nothing from a hub."""
    scripts = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "PATH": os.pathsep.join([scripts, os.environ.get("PATH", "")]),
        "WANDB_MODE": "offline",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",  # ranks on the CPU, also where there are GPUs; tests/gpu shows them again
        **extra,
    }


def anyshard(
    *arguments: str, cwd: Path, timeout_s: float = 180, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=cwd,
        env=environment(**(env or {})),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def _from_a_terminal() -> None:
    """Tests may run under nohup or in the background of a script, where these signals are ignored by whatever is started."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def start(*arguments: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Start a command and leave it running."""
    return subprocess.Popen(
        [*COMMAND, *arguments],
        preexec_fn=_from_a_terminal,
        cwd=cwd,
        env=environment(**(env or {})),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], timeout_s: float = 60) -> tuple[int, str, str]:
    """Wait for a started command: exit code, standard output, standard error."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"still running after {timeout_s} s\n{out}\n{err}") from None
    return process.returncode, out, err


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str], timeout_s: float = 90) -> Any:
    """Poll until the condition holds; fails when the process ends first or time is up."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        value = condition()
        if value:
            return value
        if process.poll() is not None:
            out, err = process.communicate()
            raise AssertionError(f"ended with {process.returncode} before that\n{out}\n{err}")
        time.sleep(0.02)
    process.kill()
    raise AssertionError(f"not within {timeout_s} s")


def events(run: Path) -> list[dict[str, Any]]:
    """The events of a run; a line that is being written is left out."""
    path = run / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def happened(run: Path, kind: str) -> list[dict[str, Any]]:
    """The events of one kind."""
    return [event for event in events(run) if event["event"] == kind]


def steps(run: Path) -> list[dict[str, Any]]:
    """The records of logged steps."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [record for record in (json.loads(line) for line in lines if line.endswith("}")) if "train/loss" in record]


def rank_pids(launcher: subprocess.Popen[str]) -> list[int]:
    """Processes of the ranks under a running `anyshard train`, by rank."""
    import psutil

    ranks = {}
    for child in psutil.Process(launcher.pid).children(recursive=True):
        try:
            if "anyshard.trainer.run" in child.cmdline() and "torch.distributed.run" not in child.cmdline():
                ranks[int(child.environ()["RANK"])] = child.pid
        except (psutil.NoSuchProcess, KeyError):
            continue
    return [ranks[rank] for rank in sorted(ranks)]


def plugin(folder: Path, name: str, methods: str) -> dict[str, str]:
    """A callback of a user's own package, as pip would install it; returns the environment that finds it."""
    site = folder / "site"
    (site / f"{name}-1.0.dist-info").mkdir(parents=True)
    (site / f"{name}-1.0.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (site / f"{name}-1.0.dist-info" / "entry_points.txt").write_text(f"[anyshard.plugins]\ncallback.{name} = {name}:Mine\n")
    (site / f"{name}.py").write_text(
        "import os, time\n"
        "from pathlib import Path\n"
        "from anyshard.trainer.callbacks.base import Callback\n"
        "class Mine(Callback):\n" + textwrap.indent(textwrap.dedent(methods), "    ")
    )
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))}
