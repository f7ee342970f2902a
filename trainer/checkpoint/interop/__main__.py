"""The process that `anyshard ckpt export|import|convert|diff` starts: reads a request, prints lines of JSON.

    python -m anyshard.trainer.checkpoint.interop '{"command": "diff", "a": "...", "b": "...", "weights_only": false}'

A line is {"progress": [bytes done, bytes in all]}, {"result": ...} or {"error": [class name, message]}; the exit code is
that of the error. Whatever libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from anyshard.configs.errors import EXIT_DONE, EXIT_FAILED, AnyshardError
from anyshard.configs.places import as_env_error

REPORT_EVERY_S = 0.1


class _Lines:
    """Standard output as it was at the start, for the launcher alone."""

    def __init__(self) -> None:
        self._descriptor = os.dup(1)
        os.dup2(2, 1)
        self._reported_s = 0.0

    def send(self, line: dict[str, Any]) -> None:
        os.write(self._descriptor, json.dumps(line).encode() + b"\n")

    def progress(self, done: int, total: int) -> None:
        """Tell how far it is, not too often."""
        now_s = time.monotonic()
        if done >= total or now_s - self._reported_s > REPORT_EVERY_S:
            self._reported_s = now_s
            self.send({"progress": [done, total]})


def _ended(*_: object) -> None:
    raise KeyboardInterrupt


def main(argv: list[str]) -> int:
    """Do what the request says; returns the exit code."""
    lines = _Lines()
    signal.signal(signal.SIGTERM, _ended)
    try:
        request = json.loads(argv[0])
        from anyshard.trainer.checkpoint.interop.commands import COMMANDS

        command: Callable[..., Any] = COMMANDS[request.pop("command")]
        lines.send({"result": command(**request, report=lines.progress)})
    except AnyshardError as error:
        lines.send({"error": [type(error).__name__, str(error)]})
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:
        told = as_env_error(error)
        if told is not None:
            lines.send({"error": ["EnvError", str(told)]})
            return told.exit_code
        lines.send({"error": ["", traceback.format_exc()]})
        return EXIT_FAILED
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
