"""Commands that need torch, in a process of their own: its progress as a bar, its error as ours, its end with ours."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from types import FrameType
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from anyshard.configs import errors
from anyshard.configs.errors import AnyshardError, LaunchError

MODULE = "anyshard.trainer.checkpoint.interop"
TAIL_LINES = 15


def call(label: str, request: dict[str, Any], *, show_progress: bool, module: str = MODULE) -> Any:
    """Run `python -m module REQUEST` and give back its result.

    A signal that ends this process ends that one first, so that it can remove what it has begun.

    Args:
        label: beside the progress bar.
        show_progress: draw the bar, where standard output is a terminal.

    Raises:
        AnyshardError: the one that the child reported, with its exit code.
        LaunchError: the child failed or died without saying why.
    """
    with tempfile.TemporaryFile("w+") as stderr:
        command = [sys.executable, "-m", module, json.dumps(request)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, stdin=subprocess.DEVNULL, text=True)
        before = signal.signal(signal.SIGTERM, _ended)
        try:
            assert child.stdout is not None
            answer = _follow(child.stdout, label, show_progress=show_progress)
            code = child.wait()
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait()
            signal.signal(signal.SIGTERM, before)
        if "result" in answer:
            return answer["result"]
        kind, message = answer.get("error", ("", ""))
        if kind:
            raise _error(kind, message)
        stderr.seek(0)
        tail = "\n".join(stderr.read().splitlines()[-TAIL_LINES:])
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
        raise LaunchError(f"{label}: the process {how}.\n{message or tail}".rstrip())


def _ended(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _follow(lines: IO[str], label: str, *, show_progress: bool) -> dict[str, Any]:
    """Draw what the child tells; returns its last line that is not progress, empty when it died before."""
    console = Console()
    columns = (TextColumn(label), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    answer: dict[str, Any] = {}
    with Progress(*columns, console=console, transient=True, disable=not show_progress or not console.is_terminal) as progress:
        task = progress.add_task(label, total=None)
        for line in lines:
            message = json.loads(line)
            if "progress" in message:
                done, total = message["progress"]
                progress.update(task, completed=done, total=total)
            else:
                answer = message
    return answer


def _error(kind: str, message: str) -> AnyshardError:
    found = getattr(errors, kind, AnyshardError)
    error: AnyshardError = found(message)
    return error
