"""What Slurm says about the job of a run."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from anyshard.configs.errors import EnvError

JOB_FILE = "slurm.json"
"""In the run directory: the job that was submitted last."""


@dataclass(frozen=True)
class Job:
    """A job that is in the queue.

    Attributes:
        state: PENDING, RUNNING, COMPLETING, ... as squeue shows it.
    """

    job_id: str
    state: str
    nodes: str


def submitted_job(run_dir: Path) -> str | None:
    """The id of the job that was submitted last for this run."""
    try:
        record = json.loads((run_dir / JOB_FILE).read_text())
    except (OSError, json.JSONDecodeError):
        return None
    return str(record["job_id"])


def job_in_queue(run_dir: Path) -> Job | None:
    """The run's job while it waits, runs or ends; None without one, or where there is no Slurm to ask."""
    job_id = submitted_job(run_dir)
    if job_id is None or shutil.which("squeue") is None:
        return None
    command = ["squeue", "--noheader", f"--jobs={job_id}", "--format=%T %R"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()  # nothing, and an error, for a job that Slurm has forgotten
    if not lines:
        return None
    state, _, nodes = lines[0].strip().partition(" ")
    return Job(job_id, state, nodes)


def check_not_submitted(run_dir: Path) -> None:
    """Refuse a run that has a job in the queue.

    Raises:
        EnvError: it has.
    """
    job = job_in_queue(run_dir)
    if job is not None and job.state not in ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT"):
        raise EnvError(
            f"run.dir={run_dir}: job {job.job_id} of this run is in the queue already ({job.state} {job.nodes}). "
            f"Look with 'squeue -j {job.job_id}', end it with 'scancel {job.job_id}' or 'anyshard runs stop {run_dir}', "
            "or choose another run.dir."
        )
