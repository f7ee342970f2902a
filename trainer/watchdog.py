"""A rank that makes no progress says where it stands, before the collective that it may wait in gives up."""

from __future__ import annotations

import faulthandler
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

STDERR = 2
"""The file descriptor, not `sys.stderr`: a rank's log, wherever Python's own object points."""


class Watchdog:
    """Once no `beat` has come for `limit_s`: the stacks of all threads to standard error (the rank's log), a call of `tell`.

    It ends nothing: a slow step goes on, and is told about once. Enter it as a context manager around the work.

    Args:
        limit_s: time between two beats; None turns it off.
        tell: called on the watchdog's own thread with the seconds since the last beat.
    """

    def __init__(self, limit_s: float | None, tell: Callable[[float], None]) -> None:
        self._limit_s, self._tell = limit_s, tell
        self._last = time.monotonic()
        self._paused = False
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self) -> None:
        """There is progress."""
        self._last = time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Watch nothing for a while: for what takes its time and bounds its own waits."""
        self._paused = True
        try:
            yield
        finally:
            self.beat()
            self._paused = False

    def __enter__(self) -> Watchdog:
        self.beat()
        if self._limit_s is not None:
            self._thread = threading.Thread(target=self._watch, args=(self._limit_s,), name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self, limit_s: float) -> None:
        told_of: float | None = None
        while not self._ended.wait(limit_s / 4):
            last = self._last
            silent_s = time.monotonic() - last
            if silent_s > limit_s and last != told_of and not self._paused:
                told_of = last
                faulthandler.dump_traceback(file=STDERR, all_threads=True)
                self._tell(silent_s)
