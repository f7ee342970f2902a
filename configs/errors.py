"""The errors that people see, and the exit code of each.

Every message names the key and its value, says why it cannot be, and what to set instead. An exception that is not
one of these is a defect of ours and ends with exit code 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_CONFIG = 2
EXIT_ENVIRONMENT = 3
EXIT_REQUEUE = 75  # stopped early with the state saved (EX_TEMPFAIL of sysexits.h): start me again


class AnyshardError(Exception):
    """Base of all errors meant for people."""

    exit_code = EXIT_FAILED


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a configuration: `key = value` cannot be, because of `reason`; `fix` says what can."""

    key: str
    value: object
    reason: str
    fix: str

    def __str__(self) -> str:
        return f"{self.key}={_short(self.value)}: {self.reason} {self.fix}"


def _short(value: object, limit: int = 120) -> str:
    text = str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


class ConfigError(AnyshardError):
    """The configuration is wrong; `problems` holds every one that was found."""

    exit_code = EXIT_CONFIG

    def __init__(self, problems: Sequence[Problem] | Problem | str) -> None:
        if isinstance(problems, Problem):
            problems = [problems]
        self.problems: list[Problem] = [] if isinstance(problems, str) else list(problems)
        if isinstance(problems, str):
            text = problems
        elif len(self.problems) == 1:
            text = str(self.problems[0])
        else:
            text = f"{len(self.problems)} problems:\n" + "\n".join(f"  - {problem}" for problem in self.problems)
        super().__init__(text)


class PlanError(ConfigError):
    """The configuration is legal but cannot be planned (it does not fit, or cannot be divided)."""


class DataError(ConfigError):
    """The data cannot be used: missing, empty, unreadable, or not what the configuration says."""


class EnvError(AnyshardError):
    """This machine lacks something: a library, a device, disk space, a free port."""

    exit_code = EXIT_ENVIRONMENT


class TrainError(AnyshardError):
    """Training cannot go on: the loss is not finite, or a callback failed."""


class LaunchError(AnyshardError):
    """Ranks could not be started or died."""


class HostLostError(LaunchError):
    """A node does not answer any more."""


class CheckpointError(AnyshardError):
    """A checkpoint cannot be written, read, or is damaged; the message names the file and what is wrong."""


class DiskFullError(CheckpointError):
    """A checkpoint cannot be written because the disk is full."""

    exit_code = EXIT_ENVIRONMENT
