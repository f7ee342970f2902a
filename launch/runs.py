"""`anyshard runs`: looks at run directories and leaves wishes in them."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from rich.table import Table

from anyshard.configs.errors import ConfigError, Problem
from anyshard.configs.frozen import checkpoint_dir_in
from anyshard.launch.console import make_console
from anyshard.launch.slurm import job_in_queue, submitted_job
from anyshard.trainer.callbacks.curves import plot as draw
from anyshard.trainer.callbacks.curves import read_metrics, write_csv
from anyshard.trainer.checkpoint.catalog import list_checkpoints


def require_run(run: Path) -> Path:
    """The run directory, or the error that says it is none.

    Raises:
        ConfigError: there is no frozen configuration in it.
    """
    if not (run / "config.yaml").exists():
        fix = "Give a run directory; 'anyshard runs ls FOLDER' lists them."
        raise ConfigError(Problem("RUN", run, "this is not a run directory: it has no config.yaml.", fix))
    return run


def read_events(run: Path) -> list[dict[str, Any]]:
    """The events of a run, oldest first; a line that was cut off by a crash is left out."""
    path = run / "events.jsonl"
    events = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return events


def last_attempt(run: Path) -> list[dict[str, Any]]:
    """The events since the ranks were last started."""
    events = read_events(run)
    starts = [number for number, event in enumerate(events) if event["event"] == "start"]
    return events[starts[-1] :] if starts else []


def ended_with_a_stop(run: Path) -> bool:
    """Whether the last thing that the run recorded is an agreed stop with its save."""
    return any(event["event"] == "stop" for event in last_attempt(run))


def state_of(run: Path) -> str:
    """queued or running by Slurm's queue; else new, running, done, stopped or died by the last attempt's events and process."""
    attempt = last_attempt(run)
    job = job_in_queue(run)
    if job is not None and job.state == "PENDING":
        return "queued"
    if job is not None and job.state == "RUNNING" and not any(event["event"] == "done" for event in attempt):
        return "running"
    if not attempt:
        return "new"
    kinds = [event["event"] for event in attempt]
    if "done" in kinds:
        return "done"
    if "stop" in kinds:
        return "stopped"
    return "running" if _lives(attempt[0]) else "died"


def _lives(start: dict[str, Any]) -> bool:
    try:
        process = psutil.Process(start["pid"])
    except psutil.NoSuchProcess:
        return False
    return float(process.create_time()) <= float(start["time"])


def summary(run: Path) -> dict[str, Any]:
    """One run in a few numbers."""
    steps = [record for record in read_metrics(run) if "train/loss" in record]
    starts = [event for event in read_events(run) if event["event"] == "start"]
    last = steps[-1] if steps else {}
    checkpoints = [found.path for found in list_checkpoints(checkpoint_dir_in(run)) if found.problem is None]
    return {
        "run": str(run),
        "state": state_of(run),
        "step": last.get("step"),
        "loss": last.get("train/loss"),
        "tokens_per_s": last.get("perf/tokens_per_s"),
        "hosts": starts[-1].get("hosts", []) if starts else [],
        "job": submitted_job(run),
        "attempts": len(starts),
        "checkpoint": checkpoints[0].name if checkpoints else None,
        "checkpoint_age_s": round(time.time() - checkpoints[0].stat().st_mtime) if checkpoints else None,
    }


def ls(folder: Path, *, as_json: bool) -> int:
    """List the runs below a folder, oldest first."""
    runs = sorted(
        (path.parent for path in folder.glob("**/config.yaml") if (path.parent / "overrides.yaml").exists()),
        key=lambda run: run.stat().st_ctime,
    )
    rows = [summary(run) for run in runs]
    if as_json:
        print(json.dumps(rows, indent=2))
        return 0
    if not rows:
        print(f"no runs in {folder}")
        return 0
    table = Table()
    for column in ("run", "state", "step", "loss", "tokens/s", "checkpoint", "age", "host", "job", "starts"):
        table.add_column(column, justify="left" if column in ("run", "state", "checkpoint", "host") else "right")
    for row in rows:
        age = row["checkpoint_age_s"]
        table.add_row(
            row["run"],
            row["state"],
            _cell(row["step"], "{}"),
            _cell(row["loss"], "{:.4f}"),
            _cell(row["tokens_per_s"], "{:,.0f}"),
            row["checkpoint"] or "",
            "" if age is None else f"{age // 3600}h{age % 3600 // 60:02}m" if age >= 3600 else f"{age // 60}m{age % 60:02}s",
            _hosts(row["hosts"]),
            row["job"] or "",
            str(row["attempts"]),
        )
    make_console().print(table)
    return 0


def _hosts(hosts: Sequence[str]) -> str:
    return "" if not hosts else hosts[0] if len(hosts) == 1 else f"{hosts[0]} +{len(hosts) - 1}"


def _cell(value: Any, form: str) -> str:
    return "" if value is None else form.format(value)


def tail(run: Path, *, lines: int, follow: bool) -> int:
    """Print the last metrics of a run, and new ones as they come while it runs."""
    path = require_run(run) / "metrics.jsonl"
    shown = 0
    records = path.read_text().splitlines() if path.exists() else []
    shown = max(0, len(records) - lines)
    while True:
        records = path.read_text().splitlines() if path.exists() else []
        for line in records[shown:]:
            print(
                " ".join(
                    f"{name}={value:.6g}" if isinstance(value, float) else f"{name}={value}"
                    for name, value in json.loads(line).items()
                )
            )
        shown = len(records)
        if not follow or state_of(run) in ("done", "stopped", "died"):
            return 0
        time.sleep(1)


def ask(run: Path, wish: str) -> int:
    """Touch STOP or SAVE in a run directory."""
    (require_run(run) / wish).touch()
    done = {"STOP": "will stop after its present step, with a save", "SAVE": "will save after its present step"}[wish]
    print(
        f"{run} {done}" if state_of(run) == "running" else f"{run} is not running; the file {wish} is there for its next start"
    )
    return 0


def plot(runs: Sequence[Path], out: Path | None) -> int:
    """Draw the curves of one run or of several on one picture, and write them as CSV."""
    for run in runs:
        require_run(run)
    for run in runs:
        print(write_csv(run))
    print(draw(runs, out or (runs[0] / "curves.png" if len(runs) == 1 else Path("runs.png"))))
    return 0
