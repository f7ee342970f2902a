"""What one waits for: `anyshard --help`, `anyshard plan` of an 8B model, and the first step of `anyshard train`.

    python benchmarks/bench_startup.py [--repeats 7]

The first step is timed from the start of the command to the line on the console that reports the step, for
`anyshard train debug=smoke launch.procs_per_node=2` and for the hand-written loop under plain
`torchrun --nproc-per-node 2`, which take turns; operators and the tokens are there already. The seconds between the
run directory's own records say where ours go. Exit code 1 when a target is missed.
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

from common import hand_written_options, machine, repeat_with, spread, verdict

from anyshard.configs.frozen import load_frozen
from anyshard.offload.op_cache import op_env

MAX_HELP_S = 0.3
MAX_PLAN_S = 2.0
MAX_MORE_S = 0.5
PLAN = ["plan", "model=llama3_8b", "zero=z3", "cluster=8xh100", "launch.procs_per_node=8"]
TRAIN = ["train", "debug=smoke", "launch.procs_per_node=2", "train.log_every_steps=1", "checkpoint=none"]
HAND_WRITTEN = Path(__file__).with_name("hand_written.py")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    print(machine())
    anyshard = [str(Path(sys.executable).with_name("anyshard"))]
    met = []
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, **op_env(), "DS_ACCELERATOR": "cpu", "ANYSHARD_CACHE": folder}
        for what, command, target in (("--help", ["--help"], MAX_HELP_S), ("plan of llama3_8b, warm", PLAN, MAX_PLAN_S)):
            seconds = [to_the_end([*anyshard, *command], environment) for _ in range(args.repeats + 1)][1:]
            print(f"anyshard {what}: {spread(seconds)} s, median (quartiles)")
            met.append(verdict(f"  anyshard {what}", statistics.median(seconds), target, unit="s"))
        met.append(first_step(anyshard, Path(folder), environment, args.repeats))
    repeat_with()
    return 0 if all(met) else 1


def first_step(anyshard: list[str], folder: Path, environment: dict[str, str], repeats: int) -> bool:
    """Both sides in turns, after one of each that is not counted; returns whether ours is at most MAX_MORE_S later."""
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", "2"]
    options = folder / "options.json"
    ours, theirs = [], []
    for number in range(repeats + 1):
        run_dir = folder / f"run{number}"
        seconds = to_first_step([*anyshard, *TRAIN, f"run.dir={run_dir}"], environment)
        if number == 0:
            (tokens,) = folder.glob("tokens/*/train.bin")
            ds_config = json.loads((run_dir / "ds_config.json").read_text())
            options.write_text(json.dumps(hand_written_options(load_frozen(run_dir), ds_config, tokens)))
        other = to_first_step([*torchrun, str(HAND_WRITTEN), str(options)], environment)
        if number:
            ours.append(seconds)
            theirs.append(other)
    more = statistics.median(a - b for a, b in zip(ours, theirs, strict=True))
    print(f"first step: {machine()}")
    print(f"  anyshard train             {spread(ours)} s, median (quartiles)")
    print(f"  hand-written, torchrun     {spread(theirs)} s")
    print(f"  ratio {statistics.median(ours) / statistics.median(theirs):.3f}")
    return verdict("  from command to first step, more than hand-written", more, MAX_MORE_S, unit="s")


def to_the_end(command: list[str], environment: dict[str, str]) -> float:
    started = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return time.perf_counter() - started


def to_first_step(command: list[str], environment: dict[str, str]) -> float:
    """Seconds until the line of the first step is on standard output; waits for the end of the command as well."""
    started = time.perf_counter()
    seconds = None
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if seconds is None and line.split()[:1] == ["step"]:
                seconds = time.perf_counter() - started
        if process.wait() or seconds is None:
            errors.seek(0)
            sys.exit(f"{' '.join(command)} failed:\n{errors.read()[-4000:]}")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
