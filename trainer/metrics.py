"""What a run tells people and machines: the step line, `metrics.jsonl`, `events.jsonl`, and a live bar on a terminal.

Only rank 0 writes. The trackers (wandb) get the same records as `metrics.jsonl`.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from anyshard.configs.writing import writing
from anyshard.trainer.tracking import Tracker

logger = logging.getLogger(__name__)


def human(number: float) -> str:
    """A count with three digits and k, M, G or T: 412k, 3.02M."""
    for suffix in ("", "k", "M", "G", "T"):
        if abs(number) < 999.5:
            return f"{number:.3g}{suffix}"
        number /= 1000
    return f"{number:.3g}P"


def duration(seconds: float) -> str:
    """A time span in at most two units: 42s, 3m20s, 1h12m, 2d4h."""
    seconds = round(seconds)
    for size, big, small_size, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if seconds >= size:
            return f"{seconds // size}{big}{seconds % size // small_size}{small}"
    return f"{seconds}s"


def step_line(record: dict[str, Any], max_steps: int) -> str:
    """The console line of a logged step."""
    step = record["step"]
    parts = [
        f"step {step:>{len(str(max_steps))}}/{max_steps} {100 * step / max_steps:3.0f}%",
        f"loss {record['train/loss']:.4f}",
    ]
    parts.append(f"lr {record['train/lr']:.1e}")
    if record.get("train/grad_norm") is not None:
        parts.append(f"gnorm {record['train/grad_norm']:.2f}")
    parts.append(f"{human(record['perf/tokens_per_s'])} tok/s")
    if record.get("perf/mfu_pct") is not None:
        parts.append(f"{record['perf/mfu_pct']:.1f}% MFU")
    parts.append(f"{record['mem/peak_gib']:.2f}GiB")
    parts.append(f"data {record['perf/data_wait_pct']:.1f}%")
    if record.get("ckpt/stall_ms"):
        parts.append(f"ckpt {record['ckpt/stall_ms']:.0f}ms")
    if record.get("train/skipped_steps"):
        parts.append(f"skipped {record['train/skipped_steps']}")
    parts.append(f"eta {duration(record['perf/eta_s'])}")
    return "  ".join(parts)


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this rank so far: allocated on the accelerator, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30  # Linux counts ru_maxrss in KiB


class JsonLines:
    """An append-only file of one JSON object a line, written line by line.

    A line that cannot be written (the disk is full) is dropped as a whole and told once: no log is worth the training.

    Raises:
        EnvError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._told = False
        self._lock = threading.Lock()
        with writing(path.parent):
            self._file = path.open("ab", buffering=0)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; any thread may call it. JSON has no word for a number that is not finite: null."""
        sayable = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
        }
        line = json.dumps(sayable).encode() + b"\n"
        with self._lock:
            self._append(line)

    def _append(self, line: bytes) -> None:
        before = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._file.truncate(before)
            if not self._told:
                logger.warning("%s cannot be written (%s): lines are lost, training goes on", self._path, error.strerror)
            self._told = True

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Reporter:
    """Writes a run's records; on ranks other than 0 every method does nothing.

    Args:
        run_dir: the run directory; metrics.jsonl and events.jsonl are appended to.
        max_steps: the length of the bar.
    """

    def __init__(
        self, run_dir: Path, *, rank: int, max_steps: int, trackers: list[Tracker], stream: TextIO | None = None
    ) -> None:
        self.max_steps = max_steps
        self._on = rank == 0
        self._trackers = trackers
        self._started_s = time.time()
        if not self._on:
            return
        self._metrics = JsonLines(run_dir / "metrics.jsonl")
        self._events = JsonLines(run_dir / "events.jsonl")
        stream = stream or sys.stdout
        # rich reads COLUMNS and TERM itself; off a terminal lines must not be wrapped
        width = None if stream.isatty() else 10_000
        self.console = Console(file=stream, width=width, highlight=False, soft_wrap=not stream.isatty())
        self._bar: Progress | None = None
        self._task: Any = None

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(failed=kind is not None)

    def start_bar(self, step: int) -> None:
        """Show the live bar, on a terminal only."""
        if not self._on or not self.console.is_terminal or os.environ.get("ANYSHARD_NO_BAR"):
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=self.console, transient=True, refresh_per_second=2, redirect_stderr=False)
        self._task = self._bar.add_task("training", total=self.max_steps, completed=step)
        self._bar.start()

    def tick(self, step: int) -> None:
        """Move the bar."""
        bar = self._bar if self._on else None
        if bar is not None:
            self._show(lambda: bar.update(self._task, completed=step))

    def say(self, text: str) -> None:
        """A line for people."""
        if self._on:
            self._show(lambda: self.console.print(text, markup=False))

    def _show(self, show: Callable[[], object]) -> None:
        """Write to the console; when nobody is there any more (a closed terminal or pipe), go on without it."""
        if self.console.quiet:
            return
        try:
            show()
        except (OSError, SystemExit) as error:  # rich ends the program when a pipe breaks
            self.console.quiet = True
            logger.warning("the console cannot be written (%s): metrics.jsonl and the logs go on, and so does training", error)

    def step(self, record: dict[str, Any]) -> None:
        """Record a logged step: file, trackers and console."""
        if not self._on:
            return
        self._log(record)
        self.say(step_line(record, self.max_steps))

    def evaluation(self, record: dict[str, Any]) -> None:
        """Record an evaluation: file, trackers and console."""
        if not self._on:
            return
        self._log(record)
        numbers = "  ".join(
            f"{name.removeprefix('eval/')} {value:.4f}" for name, value in record.items() if name.startswith("eval/")
        )
        self.say(f"eval at step {record['step']}: {numbers}")

    def _log(self, record: dict[str, Any]) -> None:
        record = {**record, "time": time.time(), "elapsed_s": round(time.time() - self._started_s, 3)}
        self._metrics.write(record)
        for tracker in self._trackers:
            tracker.log(record)

    def event(self, kind: str, **details: Any) -> None:
        """Record that something happened: start, restore, save_begin, commit, stop, nan, ... Any thread may call it."""
        if self._on:
            self._events.write({"time": time.time(), "event": kind, **details})

    def close(self, *, failed: bool = False) -> None:
        """Take the bar down and close files and trackers."""
        if not self._on:
            return
        self._on = False
        if self._bar is not None:
            self._show(self._bar.stop)
        self._metrics.close()
        self._events.close()
        for tracker in self._trackers:
            tracker.finish(failed=failed)
