"""Why attempts of a run failed: what failing ranks wrote, which of them was the first, and the list in the run directory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from anyshard.configs.errors import HostLostError
from anyshard.configs.writing import writing

FILE = Path("launch") / "failures.jsonl"
"""In the run directory: one line for each attempt that failed."""

NOT_CURABLE = ("TrainError",)
"""Errors of exit code 1 that come again: the same data through the same arithmetic."""


LOST = HostLostError.__name__


@dataclass(frozen=True)
class Failure:
    """How one attempt failed.

    Attributes:
        time: as `time.time()`.
        kind: the exception's class, or the signal that ended the rank.
        for_people: the message is ours, and needs no traceback.
        step: the newest step that was committed by then, -1 for none.
    """

    time: float
    kind: str
    message: str
    exit_code: int
    rank: int | None = None
    host: str | None = None
    for_people: bool = False
    step: int = -1

    @property
    def is_curable(self) -> bool:
        """Whether a restart may cure it: not a wrong configuration or machine, nor arithmetic that would do the same again."""
        return self.exit_code not in (2, 3) and self.kind not in NOT_CURABLE

    @property
    def is_collateral(self) -> bool:
        """Whether a rank failed only because another was gone: it says so itself, or DeepSpeed and gloo do."""
        return not self.for_people and bool(
            re.search(r"closed by peer|reset by peer|Connection refused|remote worker|Broken pipe", self.message)
        )

    def told(self, logs: Path) -> str:
        """What people read."""
        if self.for_people:
            return f"{self.kind}: {self.message}"
        on = f" on {self.host}" if self.host else ""
        return f"rank {self.rank} failed{on} (its log: {logs}/rank{self.rank or 0:05d}.log):\n{self.message}"

    def is_like(self, other: Failure) -> bool:
        """Whether both failed in the same way at the same place, and by an error of the program."""
        return (
            not self.kind.startswith("SIG")
            and self.kind not in ("died", "unknown", LOST)
            and not self.is_collateral
            and (self.kind, self.step, _last_line(self.message)) == (other.kind, other.step, _last_line(other.message))
        )


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]


def read_records(folder: Path) -> list[Failure]:
    """What failing ranks wrote into this folder (ANYSHARD_ERRORS)."""
    return [_failure(json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]


def _failure(record: Mapping[str, Any]) -> Failure:
    return Failure(**{field.name: record[field.name] for field in fields(Failure) if field.name in record})


def first_cause(records: Iterable[Failure]) -> Failure | None:
    """The earliest failure that was not the consequence of another one, None where all were.

    Of two nodes that lost each other, the first one's word counts: it hears the others.
    """

    def order(record: Failure) -> tuple[bool, float]:
        return record.kind == LOST and record.rank != 0, record.time

    return min((record for record in records if not record.is_collateral), key=order, default=None)


def silent_rank(records: Sequence[Failure], start: Mapping[str, Any]) -> tuple[int, str | None] | None:
    """The first rank that died without a word where others did speak, and its host; None where none did or nobody spoke.

    Args:
        start: the event of the attempt's start.
    """
    spoken = {record.rank for record in records}
    world_size, hosts = int(start.get("world_size", 0)), start.get("hosts") or []
    silent = [rank for rank in range(world_size) if rank not in spoken]
    if not spoken or not silent:
        return None
    return silent[0], hosts[silent[0] * len(hosts) // world_size] if hosts else None


def append(run_dir: Path, failure: Failure, events: Sequence[Mapping[str, Any]]) -> Failure:
    """Add an attempt's failure to the list of the run.

    Args:
        events: of the run, for the newest step that was committed.

    Raises:
        EnvError: the run directory cannot be written.
    """
    committed = [int(event["step"]) for event in events if event["event"] == "commit"]
    failure = replace(failure, step=max(committed, default=-1))
    path = run_dir / FILE
    with writing(run_dir):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(asdict(failure)) + "\n")
    return failure


def read(run_dir: Path) -> list[Failure]:
    """The failures of a run, oldest first."""
    path = run_dir / FILE
    lines = path.read_text().splitlines() if path.exists() else []
    return [_failure(json.loads(line)) for line in lines if line.endswith("}")]
