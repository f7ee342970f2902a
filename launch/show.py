"""`anyshard runs show` and `compare`: one run attempt by attempt, several runs side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.table import Table

from anyshard.configs import frozen
from anyshard.configs.errors import ConfigError
from anyshard.configs.keys import flatten
from anyshard.launch import failures
from anyshard.launch.console import make_console
from anyshard.launch.failures import Failure
from anyshard.launch.runs import read_events, require_run, summary
from anyshard.trainer.callbacks.curves import read_metrics

NAMES_AND_PLACES = ("run", "launch", "cluster", "tracking", "resume", "stop", "checkpoint.dir")
"""What tells runs apart without making them different."""


def attempts(events: Sequence[Mapping[str, Any]], failed: Sequence[Failure]) -> list[dict[str, Any]]:
    """Every start of the ranks: when, on how many and on which hosts, from which step, and how it ended.

    Args:
        events: of the run, oldest first.
        failed: the attempts that failed.
    """
    starts = [number for number, event in enumerate(events) if event["event"] == "start"]
    found = []
    for begin, end in zip(starts, [*starts[1:], len(events)], strict=True):
        own = events[begin:end]
        until = own[-1]["time"] if end == len(events) else events[end]["time"]
        restored = next((event["step"] for event in own if event["event"] == "restore"), 0)
        finish = next((event for event in reversed(own) if event["event"] in ("done", "stop", "nan", "host_lost")), None)
        failure = next((each for each in failed if own[0]["time"] <= each.time <= until + 60), None)
        found.append(
            {
                "started": own[0]["time"],
                "lasted_s": round(own[-1]["time"] - own[0]["time"], 1),
                "ranks": own[0]["world_size"],
                "hosts": own[0].get("hosts", []),
                "from_step": restored,
                "last_commit": max((event["step"] for event in own if event["event"] == "commit"), default=None),
                "end": _end(finish, failure),
            }
        )
    return found


def _end(finish: Mapping[str, Any] | None, failure: Failure | None) -> str:
    if finish is not None and finish["event"] == "done":
        return "done"
    if finish is not None and finish["event"] == "stop":
        return f"stopped: {finish['reason']}"
    if failure is not None:
        on = f" on {failure.host}" if failure.host else ""
        return f"failed: {failure.kind}{on}" + (f", rank {failure.rank}" if failure.rank is not None else "")
    return "" if finish is None else f"{finish['event']} {finish.get('host', '')}".strip()


def show(run: Path, *, as_json: bool) -> int:
    """One run: its state, and every attempt."""
    require_run(run)
    about = summary(run)
    made = attempts(read_events(run), failures.read(run))
    if as_json:
        print(json.dumps({**about, "attempts": made}, indent=2))
        return 0
    for name, value in about.items():
        if value is not None and value != [] and name != "attempts":
            shown = ", ".join(value) if isinstance(value, list) else f"{value:.6g}" if isinstance(value, float) else value
            print(f"{name:18} {shown}")
    table = Table()
    for column in ("attempt", "started", "for", "ranks", "hosts", "from step", "last commit", "end"):
        table.add_column(
            column, justify="right" if column in ("attempt", "for", "ranks", "from step", "last commit") else "left"
        )
    for number, each in enumerate(made, 1):
        hosts = ", ".join(each["hosts"][:2]) + (f" and {len(each['hosts']) - 2} more" if len(each["hosts"]) > 2 else "")
        started = f"{datetime.fromtimestamp(each['started']):%Y-%m-%d %H:%M:%S}"
        cells = (number, started, f"{each['lasted_s']:g}s", each["ranks"], hosts, each["from_step"], each["last_commit"])
        table.add_row(*("" if cell is None else str(cell) for cell in cells), each["end"])
    make_console().print(table)
    return 0


def differing_keys(runs: Sequence[Path]) -> dict[str, list[Any]]:
    """The keys in which these runs differ, with the value of each run."""
    configs = [frozen.load_frozen(run) for run in runs]
    names = {name: None for config in configs[1:] for name, _, _ in frozen.diff(configs[0], config)}
    found = {}
    flat = [flatten(config) for config in configs]
    for name in names:
        if not any(name == each or name.startswith(f"{each}.") for each in NAMES_AND_PLACES):
            found[name] = [values.get(name) for values in flat]
    return found


def results(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """What came of each run, with the keys in which they differ."""
    keys = differing_keys(runs)
    rows = []
    for number, run in enumerate(runs):
        about = summary(run)
        evaluations = [record for record in read_metrics(run) if "eval/loss" in record]
        own = {key: values[number] for key, values in keys.items()}
        row = {"run": str(run), **own, "state": about["state"], "step": about["step"], "loss": about["loss"]}
        row["eval/loss"] = evaluations[-1]["eval/loss"] if evaluations else None
        rows.append({**row, "tokens/s": about["tokens_per_s"]})
    return rows


def print_results(runs: Sequence[Path]) -> None:
    """Several runs side by side, those with the lowest loss first."""
    rows = results([run for run in runs if (run / frozen.CONFIG_FILE).exists()])
    rows.sort(key=lambda row: row["eval/loss"] or row["loss"] or float("inf"))
    table = Table()
    for column in rows[0] if rows else ():
        table.add_column(column, justify="left" if column in ("run", "state") else "right")
    for row in rows:
        table.add_row(*map(_cell, row.values()))
    make_console().print(table)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


def compare(runs: Sequence[Path], *, out: Path | None, as_json: bool) -> int:
    """Runs side by side: where they differ, what came of them, and their curves on one picture.

    Raises:
        ConfigError: fewer than two.
    """
    from anyshard.launch.runs import plot

    if len(runs) < 2:
        raise ConfigError("runs compare: give at least two run directories.")
    for run in runs:
        require_run(run)
    if as_json:
        print(json.dumps(results(runs), indent=2))
        return 0
    print_results(runs)
    return plot(runs, out)
