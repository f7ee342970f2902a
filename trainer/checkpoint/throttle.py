"""A bound on the rate of background writing, for disks that others need too."""

from __future__ import annotations

import threading
import time


class Throttle:
    """Spreads writes over time.

    Args:
        bytes_per_s: the bound; None for none.
    """

    def __init__(self, bytes_per_s: float | None) -> None:
        self._bytes_per_s = bytes_per_s
        self._due_s = 0.0
        self._lifted = threading.Event()

    def wait(self, num_bytes: int) -> None:
        """Call it after writing `num_bytes`: sleeps until they may be on the disk."""
        if self._bytes_per_s is None:
            return
        now = time.perf_counter()
        self._due_s = max(self._due_s, now) + num_bytes / self._bytes_per_s
        self._lifted.wait(self._due_s - now)

    def lift(self) -> None:
        """No bound for now: somebody waits."""
        self._lifted.set()

    def set(self) -> None:
        """The bound holds."""
        if self._lifted.is_set():
            self._due_s = 0.0
            self._lifted.clear()
