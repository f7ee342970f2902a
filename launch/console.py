"""Where tables go: as wide as the terminal, and as wide as they need where standard output is none."""

from __future__ import annotations

import sys

from rich.console import Console

WIDE = 10_000


def make_console() -> Console:
    """A console on standard output; off a terminal nothing is cut off or folded, so that it can be searched."""
    return Console(width=None if sys.stdout.isatty() else WIDE)
