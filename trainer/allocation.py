"""When Slurm will end the job that this process runs in."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

MARGIN_S = 60.0
"""How long before the end a run stops by itself: at most a tenth of what is left when it starts, unless saves take longer."""

SAFETY = 1.5
"""How much longer than the last save the next one may take: other jobs write to the same disks."""


@dataclass
class Allocation:
    """The job's end, and how long before it a run has to stop.

    Attributes:
        job_id: of Slurm.
        ends_at: as `time.time()`.
        margin_s: the least time before the end at which a run stops.
        most_s: the most, where a save is known to take longer than `margin_s`; None keeps to `margin_s`.
    """

    job_id: str
    ends_at: float
    margin_s: float
    most_s: float | None = None

    def is_over(self, needed_s: float = 0.0) -> bool:
        """Whether it is time to stop. The limit is looked up again before, since it can be changed while a job runs.

        Args:
            needed_s: what the present step and a save take, as far as is known.
        """
        margin_s = self.margin_s if self.most_s is None else min(max(self.margin_s, SAFETY * needed_s), self.most_s)
        if time.time() < self.ends_at - margin_s:
            return False
        self.ends_at = job_end(self.job_id) or self.ends_at
        return time.time() >= self.ends_at - margin_s


def find_allocation(environ: Mapping[str, str], margin_s: float | None) -> Allocation | None:
    """The job of Slurm that the environment names; None without one, or where it has no time limit.

    Args:
        margin_s: `stop.margin_s`.
    """
    job_id = environ.get("SLURM_JOB_ID")
    end = job_end(job_id) if job_id else None
    if job_id is None or end is None:
        return None
    if margin_s is not None:
        return Allocation(job_id, end, margin_s)
    left_s = max(end - time.time(), 0)
    return Allocation(job_id, end, min(MARGIN_S, left_s / 10), most_s=left_s / 2)


def job_end(job_id: str) -> float | None:
    """When a job ends, as `time.time()`; None without a limit, or where Slurm does not answer."""
    command = ["squeue", "--noheader", f"--jobs={job_id}", "--format=%e"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout
        return datetime.fromisoformat(shown.strip()).timestamp()
    except (OSError, subprocess.TimeoutExpired, ValueError):  # no squeue here, no answer, or N/A
        return None
