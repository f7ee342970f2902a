"""When Slurm will end the job that this process runs in."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

MARGIN_S = 60.0
"""How long before the end a run stops by itself, unless that is more than a tenth of what is left when it starts."""


@dataclass
class Allocation:
    """The job's end, and how long before it a run has to stop.

    Attributes:
        job_id: of Slurm.
        ends_at: as `time.time()`.
    """

    job_id: str
    ends_at: float
    margin_s: float

    def is_over(self) -> bool:
        """Whether it is time to stop. The limit is looked up again before, since it can be changed while a job runs."""
        if time.time() < self.ends_at - self.margin_s:
            return False
        self.ends_at = job_end(self.job_id) or self.ends_at
        return time.time() >= self.ends_at - self.margin_s


def find_allocation(environ: Mapping[str, str], margin_s: float | None) -> Allocation | None:
    """The job of Slurm that the environment names; None without one, or where it has no time limit.

    Args:
        margin_s: `stop.margin_s`.
    """
    job_id = environ.get("SLURM_JOB_ID")
    end = job_end(job_id) if job_id else None
    if job_id is None or end is None:
        return None
    if margin_s is None:
        margin_s = min(MARGIN_S, max(end - time.time(), 0) / 10)
    return Allocation(job_id, end, margin_s)


def job_end(job_id: str) -> float | None:
    """When a job ends, as `time.time()`; None without a limit, or where Slurm does not answer."""
    command = ["squeue", "--noheader", f"--jobs={job_id}", "--format=%e"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout
        return datetime.fromisoformat(shown.strip()).timestamp()
    except (OSError, subprocess.TimeoutExpired, ValueError):  # no squeue here, no answer, or N/A
        return None
