"""The training loop against a hand-written DeepSpeed loop: time per step at 125M parameters, our own Python at `tiny`.

    python benchmarks/bench_loop.py [--only 125m|tiny|tiny2] [--rounds N]

Both loops run in the same processes and take turns, a few steps each: ours is a whole `fit`, and a callback of it runs
the hand-written one between two of our steps. Each has its own DeepSpeed engine of the same model, data file and
configuration. The first step of a turn is not counted. Exit code 1 when a target is missed.

At `tiny` two figures are given. "outside the engine" is all time of a step that is not spent in the model, the loss and
DeepSpeed, taken with clocks around those calls: the thread's own, which does not run while other processes do, and that of
the wall. Of the first the mean counts, since some work is done once for several steps. The difference of the two loops'
medians also has what threads and caches cost, and the noise of whole steps.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import hand_written_options, machine, repeat_with, spread, verdict

from anyshard.configs.compose import compose
from anyshard.configs.registry import register
from anyshard.offload.op_cache import op_env
from anyshard.trainer.callbacks.base import Callback

MAX_SLOWDOWN_PCT = 1.0
MAX_OWN_US = 100.0
COMMON = ["precision=fp32", "data=synthetic", "checkpoint=none", "train.eval_every_steps=0", "train.eval_samples=0"]


@dataclass(frozen=True)
class Case:
    """One comparison: its overrides and how the turns are taken."""

    overrides: tuple[str, ...]
    ranks: int
    rounds: int
    steps_per_turn: int
    threads: int
    warmup_rounds: int = 2


CASES = {
    "125m": Case(
        ("model=llama_125m", "data.sequence_length=64", "train.global_batch_size=1", "train.micro_batch_size=1"),
        ranks=1,
        rounds=12,
        steps_per_turn=4,
        threads=2,
    ),
    "tiny": Case(
        ("model=tiny", "data.sequence_length=64", "train.global_batch_size=4", "train.micro_batch_size=4"),
        ranks=1,
        rounds=60,
        steps_per_turn=40,
        threads=1,
    ),
    "tiny2": Case(
        ("model=tiny", "data.sequence_length=64", "train.global_batch_size=8", "train.micro_batch_size=4"),
        ranks=2,
        rounds=40,
        steps_per_turn=40,
        threads=1,
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=CASES, help="one case instead of all")
    parser.add_argument("--rounds", type=int, help="turns of each side (default: 12 at 125m, 60 at tiny, 40 at tiny2)")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        return worker(args.only, args.worker, args.rounds)
    print(machine())
    met = [judge(name, args.rounds or CASES[name].rounds) for name in ([args.only] if args.only else CASES)]
    repeat_with()
    return 0 if all(met) else 1


def judge(name: str, rounds: int) -> bool:
    """Run one case in processes of its own and print it; returns whether its target is met."""
    case = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, **op_env(), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(case.threads)}
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.ranks}"]
        command = [*torchrun, __file__, "--only", name, "--rounds", str(rounds), "--worker", folder]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{name} failed:\n{done.stderr[-4000:]}")
        times = json.loads((Path(folder) / "times.json").read_text())
    ours, theirs = times["ours"], times["theirs"]
    wall_us, own_us = ([s * 1e6 for s in times[clock]] for clock in ("wall", "own"))
    print(f"{name}: ranks {case.ranks}, threads of each {case.threads}, {len(ours)} steps of each side; {machine()}")
    print(f"  ours         {spread([s * 1e3 for s in ours])} ms per step, median (quartiles)")
    print(f"  hand-written {spread([s * 1e3 for s in theirs])} ms per step")
    ratio = statistics.median(ours) / statistics.median(theirs)
    difference_us = (statistics.median(ours) - statistics.median(theirs)) * 1e6
    print(f"  ratio {ratio:.4f}, difference {difference_us:+.0f} us per step")
    print(f"  ours outside the engine: {spread(wall_us)} us per step by the wall clock")
    print(f"  ours outside the engine: {spread(own_us)} us per step by the thread's clock, mean {statistics.mean(own_us):.4g}")
    if name == "125m":
        return verdict(f"  {name}: more time per step", (ratio - 1) * 100, MAX_SLOWDOWN_PCT, unit="%")
    return verdict(f"  {name}: our own Python", statistics.mean(own_us), MAX_OWN_US, unit="us per step")


def worker(name: str, folder: Path, rounds: int) -> int:
    """One rank: `fit`, with the hand-written loop taking turns with it."""
    from anyshard.trainer.fit import fit

    case = CASES[name]
    turns = Turns(folder, rounds + case.warmup_rounds, case.steps_per_turn, case.warmup_rounds)
    register("callback", "turns")(lambda: turns)
    steps = turns.rounds * turns.steps_per_turn
    overrides = [
        *COMMON,
        *case.overrides,
        f"train.max_steps={steps + 1}",
        "train.log_every_steps=1000000",
        f"launch.procs_per_node={case.ranks}",
        f"run.dir={folder / 'run'}",
        f"data.cache_dir={folder / 'cache'}",
        "+callbacks.turns={}",
    ]
    fit(lambda: compose(overrides))
    return 0


Clocks = tuple[float, float]


def clocks() -> Clocks:
    return time.perf_counter(), time.thread_time()


def since(start: Clocks, end: Clocks, but: Clocks = (0.0, 0.0)) -> Clocks:
    return end[0] - start[0] - but[0], end[1] - start[1] - but[1]


@dataclass
class Turns(Callback):
    """A callback that times our steps, and after each turn runs and times as many of the hand-written loop."""

    folder: Path
    rounds: int
    steps_per_turn: int
    warmup_rounds: int
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)  # of our steps outside the engine, by the wall clock
    own: list[float] = field(default_factory=list)  # and by the clock of this thread
    last: Clocks = field(default_factory=lambda: clocks())
    inside: Clocks = (0.0, 0.0)

    def on_train_start(self, trainer: Any) -> None:
        from hand_written import HandWritten, Options

        ds_config = json.loads((trainer.run_dir / "ds_config.json").read_text())
        (tokens,) = (self.folder / "cache").glob("tokens/*/train.bin")
        self.hand = HandWritten(Options(**hand_written_options(trainer.config, ds_config, tokens)))
        for method in ("train_micro_step", "finish_micro_step"):
            setattr(trainer.engine, method, self._clocked(getattr(trainer.engine, method)))
        self.last = clocks()

    def _clocked(self, call: Any) -> Any:
        @functools.wraps(call)
        def clocked(*args: Any) -> Any:
            started = clocks()
            result = call(*args)
            wall, own = since(started, clocks())
            self.inside = self.inside[0] + wall, self.inside[1] + own
            return result

        return clocked

    def on_step_end(self, trainer: Any, record: dict[str, Any] | None) -> None:
        step = trainer.progress.step
        now = clocks()
        turn, number = divmod(step - 1, self.steps_per_turn)
        counted = turn >= self.warmup_rounds and number > 0 and record is None
        if counted:
            wall, own = since(self.last, now, but=self.inside)
            self.ours.append(now[0] - self.last[0])
            self.wall.append(wall)
            self.own.append(own)
        if number == self.steps_per_turn - 1:
            for n in range(self.steps_per_turn):
                started = time.perf_counter()
                self.hand.train_step()
                if turn >= self.warmup_rounds and n > 0:
                    self.theirs.append(time.perf_counter() - started)
        self.inside = (0.0, 0.0)
        self.last = clocks()

    def on_train_end(self, trainer: Any) -> None:
        if trainer.rank == 0:
            times = {"ours": self.ours, "theirs": self.theirs, "wall": self.wall, "own": self.own}
            (self.folder / "times.json").write_text(json.dumps(times))


if __name__ == "__main__":
    sys.exit(main())
