"""Curves of a run, as CSV and PNG; also what `anyshard runs plot` draws. Reads metrics.jsonl, needs no torch."""

from __future__ import annotations

import contextlib
import csv
import json
import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyshard.configs.errors import EnvError
from anyshard.trainer.callbacks.base import Callback

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from anyshard.trainer.trainer import Trainer

logger = logging.getLogger(__name__)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of a run, the last one of each step and kind only.

    Where a run went back (after a crash, or as it was told to) what came after that step is dropped: the run has left it.
    """
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    latest: dict[tuple[bool, int], dict[str, Any]] = {}
    last = 0
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # the last line of a run that was killed while writing it
        if latest and record["step"] < last:
            latest = {key: old for key, old in latest.items() if key[1] < record["step"]}
        last = record["step"]
        latest["train/loss" in record, record["step"]] = record
    return sorted(latest.values(), key=lambda record: (record["step"], "train/loss" not in record))


def read_resumes(run_dir: Path) -> list[int]:
    """The steps from which a run was resumed."""
    path = run_dir / "events.jsonl"
    steps = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # the last line of a run that was killed while writing it
            event = json.loads(line)
            steps += [int(event["step"])] if event["event"] == "restore" else []
    return steps


def write_csv(run_dir: Path) -> Path:
    """Write curves.csv: one row a record, one column a metric."""
    records = read_metrics(run_dir)
    columns = list(dict.fromkeys(name for record in records for name in record))
    path = run_dir / "curves.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(records)
    return path


def plot(run_dirs: Sequence[Path], out: Path) -> Path:
    """Draw loss, throughput, memory and checkpoint stalls of one or several runs on one picture.

    Raises:
        EnvError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise EnvError("plots need matplotlib: pip install 'anyshard[plot]'.")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2, sharex=True)
    for run_dir in run_dirs:
        _draw(axes, read_metrics(run_dir), read_resumes(run_dir), run_dir.name)
    titles = [
        ("loss", "nats per token"),
        ("throughput", "tokens/s"),
        ("peak memory of rank 0", "GiB"),
        ("waiting for checkpoints", "ms per logged interval"),
    ]
    for axis, (title, unit) in zip(axes.flat, titles, strict=True):
        axis.set(title=title, ylabel=unit)
        axis.tick_params(labelbottom=True)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in (axes[0][1], axes[1][0], axes[1][1]):
        axis.set_ylim(bottom=0)
    for axis in axes[1]:
        axis.set_xlabel("step")
    axes[0][0].legend(frameon=False)
    figure.savefig(out, dpi=120)
    return out


def _draw(axes: Any, records: list[dict[str, Any]], resumes: list[int], name: str) -> None:
    steps = [record for record in records if "train/loss" in record]
    evaluations = [record for record in records if "eval/loss" in record]
    loss: Axes = axes[0][0]
    (line,) = loss.plot([r["step"] for r in steps], [r["train/loss"] for r in steps], linewidth=1.2, label=f"{name}: training")
    if evaluations:
        loss.plot(
            [r["step"] for r in evaluations],
            [r["eval/loss"] for r in evaluations],
            "o--",
            color=line.get_color(),
            markersize=4,
            label=f"{name}: validation",
        )
    for number, step in enumerate(resumes):
        for axis in axes.flat:
            label = f"{name}: resumed" if number == 0 and axis is loss else None
            axis.axvline(step, color=line.get_color(), linestyle=":", linewidth=1, label=label)
    for axis, metric in ((axes[0][1], "perf/tokens_per_s"), (axes[1][0], "mem/peak_gib")):
        axis.plot([r["step"] for r in steps], [r.get(metric) for r in steps], linewidth=1.2, color=line.get_color())
    stalls = [(r["step"], r["ckpt/stall_ms"]) for r in steps if r.get("ckpt/stall_ms")]
    axes[1][1].vlines([step for step, _ in stalls], 0, [stall for _, stall in stalls], color=line.get_color())
    axes[1][1].plot([step for step, _ in stalls], [stall for _, stall in stalls], "o", markersize=4, color=line.get_color())


class Curves(Callback):
    """Writes curves.csv, and curves.png where matplotlib is installed, at the end of a run."""

    def on_train_end(self, trainer: Trainer) -> None:
        """Rank 0 draws."""
        if trainer.rank != 0:
            return
        trainer.reporter.say(f"curves: {write_csv(trainer.run_dir)}")
        if find_spec("matplotlib") is None:
            trainer.reporter.say("no plot: matplotlib is not installed (pip install 'anyshard[plot]')")
            return
        trainer.reporter.say(f"plot: {plot([trainer.run_dir], trainer.run_dir / 'curves.png')}")
