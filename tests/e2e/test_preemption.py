"""Runs that get a signal at any time: each saves or goes on from the last commit, none hangs, none ends with a wrong code.

One run is stopped and resumed again and again until it is done, then the next one begins. Its loss at every step is, to the
last bit, that of a run that nobody disturbed: with a sample left out, or one trained on twice, it could not be.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from helpers.cli import SMOKE, finish, happened, rank_pids, start, steps
from helpers.sampling import seed

pytestmark = pytest.mark.e2e

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
PHASES = ("command", "start", "restore", "step", "evaluation", "save")
OPTIONS = [
    *SMOKE,
    "train.global_batch_size=16",
    "train.micro_batch_size=2",  # 4 micro-steps
    "train.max_steps=60",
    "train.log_every_steps=1",
    "train.eval_every_steps=10",
    "train.eval_samples=64",
    "checkpoint.every_steps=4",
]


def wait_for_phase(phase: str, run: Path, process: subprocess.Popen[str], chance: random.Random) -> None:
    """Until the command is somewhere in this phase, or has ended."""
    kinds = {"restore": "start", "save": "save_begin"}
    before = len(happened(run, kinds.get(phase, "start"))), len(steps(run))
    until = time.monotonic() + 120

    def is_there() -> bool:
        if phase in ("command", "start"):
            return True
        if phase in kinds:
            return len(happened(run, kinds[phase])) > before[0]
        if len(steps(run)) == before[1]:
            return False
        return phase == "step" or steps(run)[-1]["step"] % 10 in (9, 0)

    while not is_there() and process.poll() is None:
        assert time.monotonic() < until, f"{phase} was never reached"
        time.sleep(0.002)
    time.sleep({"command": 1.0, "start": 5.0, "restore": 1.0}.get(phase, 0.1) * chance.random())


def send(process: subprocess.Popen[str], phase: str, chance: random.Random) -> str:
    """One signal or two, to the launcher or to one rank; returns what was done."""
    number = chance.choice(SIGNALS)
    # a rank that has only just been started does not hear a signal; the launcher repeats those that it gets
    ranks = rank_pids(process) if process.poll() is None and phase not in ("command", "start", "restore") else []
    target = chance.choice(ranks) if ranks and chance.random() < 0.3 else process.pid
    for _ in range(chance.choice((1, 1, 2))):
        if process.poll() is None and psutil.pid_exists(target):
            os.kill(target, number)
            time.sleep(0.2 * chance.random())
    return f"{number.name} to {'the launcher' if target == process.pid else 'a rank'}"


def preempt(folder: Path, count: int, chance: random.Random) -> list[str]:
    """Disturb runs so often; returns what happened, a line each."""
    undisturbed = start("train", *OPTIONS, "run.dir=undisturbed", cwd=folder)
    assert finish(undisturbed, timeout_s=300)[0] == 0
    wanted = {record["step"]: record["train/loss"] for record in steps(folder / "undisturbed")}
    told, number = [], 0
    run = folder / "run0"
    for trial in range(count):
        phase = PHASES[trial % len(PHASES)]
        begun = ["resume", run.name] if (run / "config.yaml").exists() else ["train", *OPTIONS, f"run.dir={run.name}"]
        process = start(*begun, cwd=folder)
        wait_for_phase(phase, run, process, chance)
        sent = send(process, phase, chance)
        code, out, err = finish(process, timeout_s=180)
        line = f"trial {trial}: {phase}, {sent}: exit code {code}"
        told.append(line)
        print(line, flush=True)
        complete = bool(happened(run, "done"))
        # a command that has not come as far as to handle signals ends as any program does
        as_any_program = phase == "command" and code in (-int(signal.Signals[sent.split()[0]]), 130)
        assert code == (0 if complete else 75) or as_any_program, f"{line}\n{out}\n{err}\n" + "\n".join(
            path.read_text()[-1500:] for path in run.glob("logs/*.log")
        )
        assert as_any_program or "Traceback" not in err, f"{line}\n{err}"
        losses = {record["step"]: record["train/loss"] for record in steps(run)}
        assert losses == {step: wanted[step] for step in losses}, line
        stops, commits = happened(run, "stop"), happened(run, "commit")
        assert not stops or stops[-1]["step"] == 0 or any(commit["step"] == stops[-1]["step"] for commit in commits), line
        if complete:
            assert list(losses) == list(range(1, 61)), f"{line}: {sorted(losses)}"
            number += 1
            run = folder / f"run{number}"
    return told


def test_some_preemptions(tmp_path):
    chance = random.Random(seed())
    assert len(preempt(tmp_path, 2, chance)) == 2


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_hundred_preemptions(tmp_path):
    preempt(tmp_path, 100, random.Random(7))
