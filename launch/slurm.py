"""What Slurm says about the job of a run."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from anyshard.configs.errors import EnvError
from anyshard.configs.writing import write_file

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


def remember(run_dir: Path, answer: str) -> str:
    """Write down which job was submitted last for this run; returns its id.

    Args:
        answer: what `sbatch --parsable` printed: JOB, or JOB;CLUSTER.

    Raises:
        EnvError: the run directory cannot be written.
    """
    job, _, cluster = answer.strip().partition(";")
    record = {"job_id": job, "cluster": cluster or None, "submitted": time.time()}
    write_file(run_dir / JOB_FILE, json.dumps(record) + "\n")
    return job


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


def submit_results(folder: Path, jobs: Sequence[str], python: str, directives: Sequence[str]) -> str | None:
    """Submit a job that waits for these jobs, whatever becomes of them, and compares their runs in `results.txt`.

    Args:
        folder: of the runs.
        directives: options of sbatch, such as the partition.

    Returns:
        Its id; None where Slurm refused it.
    """
    table = shlex.join([python, "-m", "anyshard", "runs", "compare", "--out", str(folder / "curves.png")])
    wait_for = f"--dependency=afterany:{':'.join(jobs)}"
    output = ["--nodes=1", "--ntasks=1", f"--output={folder / 'results.txt'}", "--job-name=results"]
    command = [
        "sbatch",
        "--parsable",
        wait_for,
        *output,
        *directives,
        "--wrap",
        f"COLUMNS=200 {table} {shlex.quote(str(folder))}/*/",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip().partition(";")[0] if done.returncode == 0 else None


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
