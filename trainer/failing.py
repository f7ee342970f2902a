"""What a rank leaves behind when it fails: a record for the launcher, which shows the first one; without one, its own words."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from pathlib import Path

from anyshard.configs.errors import EXIT_FAILED, AnyshardError
from anyshard.parallel.rank_env import host_name, rank_of


def record_failure(error: BaseException, stderr: int, *, redirected: bool, host: str | None = None) -> int:
    """Record why this rank ends; returns the exit code.

    Args:
        stderr: descriptor of the standard error that it was started with.
        redirected: standard error goes to the rank's log by now.
        host: the one that is to blame, if not this.
    """
    code = error.exit_code if isinstance(error, AnyshardError) else EXIT_FAILED
    text = str(error) if isinstance(error, AnyshardError) else "".join(traceback.format_exception(error)).rstrip()
    rank = rank_of(os.environ)
    if redirected:
        with contextlib.suppress(OSError):  # the disk of the log may be full, which may be why this rank fails
            print(f"rank {rank}: {text}", file=sys.stderr, flush=True)
    folder = os.environ.get("ANYSHARD_ERRORS")
    if folder is not None:
        record = {"rank": rank, "time": time.time(), "exit_code": code, "kind": type(error).__name__, "message": text}
        record |= {"for_people": isinstance(error, AnyshardError), "host": host or host_name(os.environ)}
        partial = Path(folder, f"rank{rank:05d}.partial")
        partial.write_text(json.dumps(record))
        partial.replace(partial.with_suffix(".json"))
    elif rank == 0 or not isinstance(error, AnyshardError):
        os.write(stderr, f"rank {rank}: {type(error).__name__}: {text}\n".encode())
    return code
