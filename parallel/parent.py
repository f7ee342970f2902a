"""Processes that end with the one that started them, also where that one is killed and can tell nobody."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def signal_when_parent_dies(signum: signal.Signals, parent: int | None = None) -> None:
    """Let the kernel send `signum` to this process when its parent ends. Linux only; elsewhere nothing happens.

    Holds across `exec`, not for children. It is the parent's thread that counts: the one that forked must live on.

    Args:
        parent: process id of the parent, where known: if it is gone already, the signal is sent at once.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signum), 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signum)
