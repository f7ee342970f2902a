"""Whether a run that failed is started again, when, and without which nodes. Pure but for `wait`."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from anyshard.launch.failures import LOST, Failure

LONGEST_S = 600.0
"""The longest wait between two attempts."""

VARIABLE = "ANYSHARD_RESTART_COUNT"
"""Tells ranks that the launcher has started them before, within one launch."""


@dataclass(frozen=True)
class Verdict:
    """What follows from a failure.

    Attributes:
        wait_s: time until the next attempt; None for no other.
        why: in words.
        exclude: nodes that have failed twice.
    """

    wait_s: float | None
    why: str
    exclude: tuple[str, ...] = ()


def judge(failures: Sequence[Failure], *, max_restarts: int, backoff_s: float) -> Verdict:
    """What follows from the last of these failures.

    Args:
        failures: of the run, oldest first.
        max_restarts: attempts in a row that may fail without a commit in between and be followed by another one.
        backoff_s: wait after the first of them; it doubles with each.
    """
    last = failures[-1]
    if not last.is_curable:
        return Verdict(None, "a restart would not cure that")
    in_a_row = _in_a_row(failures)
    if len(in_a_row) > 1 and last.is_like(in_a_row[-2]):
        return Verdict(None, "it failed twice in the same way at the same place, which a restart does not cure")
    if len(in_a_row) > max_restarts:
        spent = f"{max_restarts} restarts in a row saved nothing" if max_restarts else "launch.max_restarts=0"
        return Verdict(None, spent)
    wait_s = min(backoff_s * 2 ** (len(in_a_row) - 1), LONGEST_S)
    return Verdict(wait_s, f"restart {len(in_a_row)} of {max_restarts} without a new checkpoint", bad_hosts(failures))


def _in_a_row(failures: Sequence[Failure]) -> list[Failure]:
    """The last failures between which nothing was committed."""
    found: list[Failure] = []
    for failure in reversed(failures):
        if failure.step != failures[-1].step:
            break
        found.insert(0, failure)
    return found


def bad_hosts(failures: Sequence[Failure]) -> tuple[str, ...]:
    """Hosts on which the first rank to fail was twice, by no error of the program that would be the same anywhere."""
    of_hosts = [failure for failure in failures if failure.is_curable and (failure.kind == LOST or not failure.for_people)]
    counts = Counter(failure.host for failure in of_hosts if failure.host)
    return tuple(sorted(host for host, count in counts.items() if count > 1))


def wait(seconds: float, numbers: Sequence[signal.Signals], asked: Callable[[], bool]) -> bool:
    """Wait before another attempt; False when a signal came or `asked` says so meanwhile."""
    came: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        came.append(signum)

    before = {number: signal.signal(number, note) for number in numbers}
    try:
        ends = time.monotonic() + seconds
        while (left_s := ends - time.monotonic()) > 0 and not came and not asked():
            time.sleep(min(0.2, left_s))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return not came and not asked()


def stop_wished(run_dir: Path) -> bool:
    """Whether somebody has left a STOP file."""
    return (run_dir / "STOP").exists()
