"""What a save to shared memory at every step costs: the same run with and without `checkpoint.ram_every_steps=1`, in turns.

    python benchmarks/bench_ram.py [--size 15m] [--accumulate 1 8 32] [--rounds N] [--steps N]

One process trains, and every few steps a callback switches the saves on or off. The first step of a turn is not counted; what
is on its way at the end of a turn is waited for outside of the clocks. What a save takes of the processor does not depend on
the length of the step, so the share of the throughput that is kept does: several are measured, by gradient accumulation.
Exit code 1 when the target is missed at the longest.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import machine, repeat_with, spread

from anyshard.configs.compose import compose
from anyshard.configs.registry import register
from anyshard.offload.op_cache import op_env
from anyshard.trainer.callbacks.base import Callback

MIN_KEPT_PCT = 97.0
SIZES = {"tiny": "tiny", "15m": "llama_15m", "125m": "llama_125m"}
NEVER = 10**9
MICRO, LENGTH = 4, 128


class Turns(Callback):
    """Switches the saves on and off, and takes the time of steps and of the whole process's processors."""

    def __init__(self, rounds: int, steps: int, out: Path) -> None:
        self._rounds, self._steps, self._out = rounds, steps, out
        self._times: dict[str, list[float]] = {"with": [], "without": []}
        self._cpu: dict[str, list[float]] = {"with": [], "without": []}
        self._started: tuple[float, float] | None = None
        self._mib = 0.0

    def on_step_end(self, trainer: Any, record: dict[str, Any] | None) -> None:
        turn, number = divmod(trainer.progress.step - 1, self._steps + 1)
        mode = "with" if turn % 2 else "without"
        if self._started is not None and number and turn > 1:  # the first two turns warm up
            self._times[mode].append(time.perf_counter() - self._started[0])
            self._cpu[mode].append(time.process_time() - self._started[1])
        if number == self._steps:
            trainer.saves.drain()
            mode = "without" if turn % 2 else "with"
            trainer.config.checkpoint.ram_every_steps = 1 if mode == "with" else NEVER
        found = list(trainer.saves._memory.directory.glob("step-*/*.bin"))
        self._mib = max([self._mib, *(path.stat().st_size / 2**20 for path in found)])
        result = {"times": self._times, "cpu": self._cpu, "mib": self._mib}
        self._out.write_text(json.dumps(result))
        self._started = (time.perf_counter(), time.process_time())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="15m", help="of the model (default: 15m)")
    parser.add_argument("--accumulate", type=int, nargs="+", default=[1, 8, 32], help="micro-steps of a step")
    parser.add_argument("--rounds", type=int, default=6, help="turns of each kind (default: 6)")
    parser.add_argument("--steps", type=int, default=4, help="steps of a turn that count (default: 4)")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        return worker(args)
    kept = 0.0
    for accumulate in sorted(args.accumulate):
        with tempfile.TemporaryDirectory() as folder:
            environment = {**os.environ, **op_env(), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "2"}
            options = ["--size", args.size, "--rounds", str(args.rounds), "--steps", str(args.steps)]
            command = [sys.executable, __file__, *options, "--accumulate", str(accumulate), "--worker", folder]
            done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False)
            if done.returncode:
                sys.exit(f"it failed with exit code {done.returncode}; what it said is above")
            result = json.loads((Path(folder) / "times.json").read_text())
        without, with_ = result["times"]["without"], result["times"]["with"]
        kept = 100 * statistics.median(without) / statistics.median(with_)
        cpu = statistics.median(result["cpu"]["with"]) - statistics.median(result["cpu"]["without"])
        print(
            f"{args.size}, {result['mib']:.0f} MiB of state, {machine()}: "
            f"a step without {spread(without)} s, with {spread(with_)} s: "
            f"{kept:.1f} % kept (target >= {MIN_KEPT_PCT:g} %); processor time of a save {cpu:.2f} s",
            flush=True,
        )
    repeat_with()
    return 0 if kept >= MIN_KEPT_PCT else 1


def worker(args: argparse.Namespace) -> int:
    """Train, and measure."""
    from anyshard.trainer.fit import fit

    turns = Turns(args.rounds, args.steps, args.worker / "times.json")
    register("callback", "turns")(lambda: turns)
    (accumulate,) = args.accumulate
    overrides = [
        f"model={SIZES[args.size]}",
        "precision=fp32",
        "data=synthetic",
        f"data.sequence_length={LENGTH}",
        f"train.global_batch_size={accumulate * MICRO}",
        f"train.micro_batch_size={MICRO}",
        f"train.max_steps={2 * (args.rounds + 1) * (args.steps + 1)}",
        "train.log_every_steps=1000000",
        "train.eval_samples=0",
        "checkpoint.at_end=false",
        "checkpoint.every_steps=1000000",
        f"checkpoint.ram_every_steps={NEVER}",
        f"run.dir={args.worker / 'run'}",
        f"data.cache_dir={args.worker / 'cache'}",
        "+callbacks.turns={}",
    ]
    fit(lambda: compose(overrides))
    return 0


if __name__ == "__main__":
    sys.exit(main())
