"""Whether a job that ended goes on: `python -m anyshard.launch.requeue RUN CODE [--warned]`, asked by the Slurm script.

Exit code 0 means that this job goes back into the queue. A run that a person stopped stays stopped, one that is done has
nothing to go on with, and one that comes no further is not started again and again. Where a node has failed twice a new
job is submitted that leaves it out: Slurm lets nobody change the nodes of a job that runs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from anyshard.configs import schema
from anyshard.configs.errors import EXIT_CONFIG, EXIT_DONE, EXIT_ENVIRONMENT, EXIT_FAILED, EXIT_REQUEUE, ConfigError
from anyshard.configs.frozen import load_frozen
from anyshard.launch import failures, slurm
from anyshard.launch.failures import Failure
from anyshard.launch.restarts import judge
from anyshard.launch.runs import read_events

WITHOUT_PROGRESS = 3
"""Starts in a row without a commit after which a run is left alone."""

OF_PEOPLE = ("signal SIGTERM", "signal SIGINT", "signal SIGHUP", "file ", "stop.at_step=")
"""Reasons of a stop that was meant to last."""

ASKED_TO_END = (EXIT_REQUEUE, 128 + 10, 128 + 12, 128 + 15)
"""Exit codes of ranks that were warned before they began: 75, or USR1, USR2 and TERM before they had a handler."""


class Decision(NamedTuple):
    """Whether the job goes on, why, after which wait, and without which nodes."""

    goes_on: bool
    why: str
    wait_s: float = 0.0
    exclude: tuple[str, ...] = ()


def main(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> int:
    """Say what happens and why; returns 0 for a requeue of this job."""
    parser = argparse.ArgumentParser(prog="python -m anyshard.launch.requeue", description="Whether a job goes on.")
    parser.add_argument("run", type=Path)
    parser.add_argument("code", type=int, help="exit code of srun")
    parser.add_argument("--warned", action="store_true", help="Slurm has sent its warning")
    parser.add_argument("--never", action="store_true", help="only show why the ranks failed")
    given = parser.parse_args(argv)
    events = read_events(given.run)
    try:
        launch = load_frozen(given.run).launch
    except ConfigError:  # which the ranks have told
        launch = schema.Launch()
    ended = how_it_ended(events, given.code, warned=given.warned, asked=(given.run / "STOP").exists())
    if ended is None:
        failed = _failure(Path(environ.get("ANYSHARD_ERRORS", "/nonexistent")), events, given.code)
        print(failed.told(given.run / "logs"), flush=True)
        failures.append(given.run, failed, events)
        ended = after_failure(failures.read(given.run), given.code, launch)
    if given.never:
        return 1
    if ended.goes_on and ended.exclude:
        return _without(ended, given.run, launch, environ)
    print(f"anyshard: {'the job goes back into the queue' if ended.goes_on else 'the job ends here'}: {ended.why}", flush=True)
    return 0 if ended.goes_on else 1


def how_it_ended(events: Sequence[Mapping[str, Any]], code: int, *, warned: bool, asked: bool) -> Decision | None:
    """Whether the job goes on; None where the ranks failed.

    Args:
        events: of the run, oldest first.
        code: exit code of srun.
        warned: Slurm has sent its warning.
        asked: there is a STOP file that no rank has seen yet.
    """
    if code == EXIT_DONE and not warned:
        return Decision(False, "the run is done")
    starts = [number for number, event in enumerate(events) if event["event"] == "start"]
    attempt = events[starts[-1] :] if starts else []
    kinds = [event["event"] for event in attempt]
    if "done" in kinds:
        return Decision(False, "the run is done")
    stop = next((event for event in attempt if event["event"] == "stop"), None)
    if asked or (stop is not None and stop["reason"].startswith(OF_PEOPLE)):
        return Decision(False, "it was asked to stop" + (f" ({stop['reason']})" if stop else " (file STOP)"))
    if stop is None and not (warned and code in ASKED_TO_END):
        return None
    committed = [number for number, event in enumerate(events) if event["event"] == "commit"]
    since = sum(number > (committed[-1] if committed else -1) for number in starts)
    if since >= WITHOUT_PROGRESS:
        more = "give it more time (launch.slurm.time_min, launch.slurm.warn_s)"
        return Decision(False, f"{since} starts in a row saved nothing; {more}")
    if stop is None:
        return Decision(True, "it was warned before its first step")
    return Decision(True, f"it stopped with its state saved ({stop['reason']})")


def after_failure(failed: Sequence[Failure], code: int, launch: schema.Launch) -> Decision:
    """Whether the job goes on after the last of these failures."""
    verdict = judge(failed, max_restarts=launch.max_restarts, backoff_s=launch.backoff_s)
    return Decision(
        verdict.wait_s is not None,
        f"the ranks failed (exit code {code}); {verdict.why}",
        verdict.wait_s or 0.0,
        verdict.exclude,
    )


def _failure(records_in: Path, events: Sequence[Mapping[str, Any]], code: int) -> Failure:
    """How the attempt failed: the first rank that says why, or that died without a word."""
    records = failures.read_records(records_in)
    cause = failures.first_cause(records)
    if cause is not None:
        return cause
    start: Mapping[str, Any] = next((event for event in reversed(events) if event["event"] == "start"), {})
    silent = failures.silent_rank(records, start)
    if silent is not None:
        rank, host = silent
        told = "it died without a word, and the others lost it (killed? the kernel's log, dmesg, says so)"
        return Failure(time.time(), "died", told, EXIT_FAILED, rank=rank, host=host)
    if records:
        return min(records, key=lambda record: record.time)
    exit_code = code if code in (EXIT_CONFIG, EXIT_ENVIRONMENT) else EXIT_FAILED
    return Failure(time.time(), "unknown", f"exit code {code}; what the ranks said is above", exit_code)


def _without(ended: Decision, run_dir: Path, launch: schema.Launch, environ: Mapping[str, str]) -> int:
    """Leave nodes out: a new job, or for a chain of jobs those that wait. Returns 1 where this job is not to be requeued."""
    nodes = ",".join([*([launch.slurm.exclude] if launch.slurm.exclude else []), *ended.exclude])
    print(f"anyshard: {', '.join(ended.exclude)} has failed twice and is left out: {ended.why}", flush=True)
    chain = environ.get("SLURM_ARRAY_JOB_ID")
    if chain is not None:
        _call(["scontrol", "update", f"JobId={chain}", f"ExcNodeList={nodes}"], environ)
        return 0
    begin = f"--begin=now+{max(1, round(ended.wait_s))}"
    answer = _call(["sbatch", "--parsable", f"--exclude={nodes}", begin, str(run_dir / "launch" / "job.sbatch")], environ)
    if answer is None:
        print("anyshard: no job could be submitted without it; this one goes back into the queue", flush=True)
        return 0
    slurm.remember(run_dir, answer)
    print(f"anyshard: job {answer} goes on, without {nodes}", flush=True)
    return 1


def _call(command: Sequence[str], environ: Mapping[str, str]) -> str | None:
    # what this job's variables say would be taken as options of the new one
    env = {
        name: value for name, value in environ.items() if name == "SLURM_CONF" or not name.startswith(("SLURM_", "ANYSHARD_"))
    }
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr.strip(), flush=True)
        return None
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
