"""Whether a job that ended goes on: `python -m anyshard.launch.requeue RUN CODE [--warned]`, asked by the Slurm script.

Exit code 0 means yes. A run that a person stopped stays stopped, a run that failed or is done has nothing to go on with,
and one that comes no further is not started again and again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anyshard.configs.errors import EXIT_DONE, EXIT_REQUEUE
from anyshard.launch.runs import read_events

WITHOUT_PROGRESS = 3
"""Starts in a row without a commit after which a run is left alone."""

OF_PEOPLE = ("signal SIGTERM", "signal SIGINT", "signal SIGHUP", "file ", "stop.at_step=")
"""Reasons of a stop that was meant to last."""


def main(argv: Sequence[str]) -> int:
    """Say what happens and why; returns 0 for a requeue."""
    run_dir, code = Path(argv[0]), int(argv[1])
    goes_on, why = decide(read_events(run_dir), code, warned="--warned" in argv, asked=(run_dir / "STOP").exists())
    print(f"anyshard: {'the job goes back into the queue' if goes_on else 'the job ends here'}: {why}", flush=True)
    return 0 if goes_on else 1


def decide(events: Sequence[dict[str, Any]], code: int, *, warned: bool, asked: bool) -> tuple[bool, str]:
    """Whether the job goes on, and why.

    Args:
        events: of the run, oldest first.
        code: exit code of srun.
        warned: Slurm has sent its warning.
        asked: there is a STOP file that no rank has seen yet.
    """
    if code == EXIT_DONE and not warned:
        return False, "the run is done"
    starts = [number for number, event in enumerate(events) if event["event"] == "start"]
    attempt = events[starts[-1] :] if starts else []
    kinds = [event["event"] for event in attempt]
    if "done" in kinds:
        return False, "the run is done"
    stop = next((event for event in attempt if event["event"] == "stop"), None)
    if asked or (stop is not None and stop["reason"].startswith(OF_PEOPLE)):
        return False, "it was asked to stop" + (f" ({stop['reason']})" if stop else " (file STOP)")
    if stop is None and not (warned and code == EXIT_REQUEUE):
        return False, f"the ranks failed (exit code {code}); a restart would not cure that"
    committed = [number for number, event in enumerate(events) if event["event"] == "commit"]
    since = sum(number > (committed[-1] if committed else -1) for number in starts)
    if since >= WITHOUT_PROGRESS:
        return False, f"{since} starts in a row saved nothing; give it more time (launch.slurm.time_min, launch.slurm.warn_s)"
    return True, f"it stopped with its state saved ({stop['reason']})" if stop else "it was warned before its first step"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
