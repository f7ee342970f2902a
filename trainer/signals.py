"""Signals of this rank: the end of the process before training, a wish while training, nothing afterwards.

No torch here: a rank handles its signals before it loads anything that takes seconds.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)

_Handler = Callable[[int, FrameType | None], Any] | int | None


class Interrupted(BaseException):
    """A signal arrived before training began: nothing to save, leave at once (not an Exception: nobody may swallow it)."""

    def __init__(self, signum: int) -> None:
        self.signum = signum
        super().__init__(f"{signal.Signals(signum).name} before the first step")


@dataclass
class Signals:
    """Signal handlers of this rank.

    Attributes:
        training: a signal is a wish that the loop looks for.
        over: how the run ended is known, and no signal changes it.
        received: the first signal. Where something swallowed its `Interrupted`, the loop still finds it here.
    """

    training: bool = False
    over: bool = False
    received: int | None = None
    _before: dict[int, _Handler] = field(default_factory=dict)

    def install(self) -> None:
        """Handle TERM, INT, USR1, USR2 and HUP from now on; under nohup HUP stays ignored. Main thread only."""
        for signum in SIGNALS:
            if signum is not signal.SIGHUP or signal.getsignal(signum) is not signal.SIG_IGN:
                self._before[signum] = signal.signal(signum, self._handle)

    def uninstall(self) -> None:
        """Put back what handled them before. Main thread only."""
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before.clear()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.over or self.received is not None:  # others may follow while the ranks save and end
            return
        self.received = signum
        if not self.training:
            raise Interrupted(signum)
