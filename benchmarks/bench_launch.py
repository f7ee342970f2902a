"""What a lost rank costs: seconds from the SIGKILL of a rank to the first step that was trained after it.

    python benchmarks/bench_launch.py [--repeats 5]

`anyshard train debug=smoke launch.procs_per_node=2 launch.max_restarts=1 launch.backoff_s=0`, which restores its newest
checkpoint, and the hand-written loop under plain `torchrun --max-restarts=1`, which starts from nothing, take turns. In
both rank 1 is killed after its tenth step. From command to first step: `bench_startup.py`. Exit code 1 when the target is
missed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from common import hand_written_options, machine, repeat_with, spread, verdict

from anyshard.configs.frozen import load_frozen
from anyshard.offload.op_cache import op_env

MAX_MORE_S = 5.0
KILL_AT = 10
RUN = [
    "debug=smoke",
    "launch.procs_per_node=2",
    "train.log_every_steps=1",
    "train.max_steps=100000",
    "train.eval_every_steps=0",
]
AGAIN = ["launch.max_restarts=1", "launch.backoff_s=0", "checkpoint.every_steps=5"]
HAND_WRITTEN = Path(__file__).with_name("hand_written.py")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print(machine())
    anyshard = [str(Path(sys.executable).with_name("anyshard")), "train", *RUN, *AGAIN]
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", "2", "--max-restarts=1"]
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, **op_env(), "DS_ACCELERATOR": "cpu", "ANYSHARD_CACHE": folder}
        # without it torchrun's restarted ranks wait at the addresses of those before them, and the bare side never recovers
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        options = Path(folder, "options.json")
        for number in range(args.repeats + 1):
            run_dir = Path(folder, f"run{number}")
            seconds = to_recovery([*anyshard, f"run.dir={run_dir}"], environment, "anyshard.trainer.run")
            if number == 0:
                (tokens,) = Path(folder).glob("tokens/*/train.bin")
                ds_config = json.loads((run_dir / "ds_config.json").read_text())
                options.write_text(json.dumps(hand_written_options(load_frozen(run_dir), ds_config, tokens)))
            other = to_recovery([*torchrun, str(HAND_WRITTEN), str(options)], environment, HAND_WRITTEN.name)
            if number:  # the first of each is not counted
                ours.append(seconds)
                theirs.append(other)
    more = statistics.median(a - b for a, b in zip(ours, theirs, strict=True))
    print(f"from SIGKILL to the next step: {machine()}")
    print(f"  anyshard, from its checkpoint     {spread(ours)} s, median (quartiles)")
    print(f"  hand-written, from the beginning  {spread(theirs)} s")
    print(f"  ratio {statistics.median(ours) / statistics.median(theirs):.3f}")
    met = verdict("  more than bare torchrun", more, MAX_MORE_S, unit="s")
    repeat_with()
    return 0 if met else 1


def to_recovery(command: list[str], environment: dict[str, str], rank_program: str) -> float:
    """Seconds from the death of rank 1 to the line of the next step; ends the command then."""
    killed_s = None
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        try:
            known: set[int] = set()
            for line in process.stdout:
                if line.split()[:1] != ["step"]:
                    continue
                if killed_s is not None and ranks(process.pid, rank_program).isdisjoint(known):
                    return time.perf_counter() - killed_s
                if killed_s is None and int(line.split()[1].partition("/")[0]) >= KILL_AT:
                    known = ranks(process.pid, rank_program)
                    os.kill(rank_1(known), signal.SIGKILL)
                    killed_s = time.perf_counter()
            errors.seek(0)
            sys.exit(f"{' '.join(command)} ended:\n{errors.read()[-4000:]}")
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                for member in psutil.Process(process.pid).children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        member.kill()
            process.kill()
            process.wait()


def ranks(launcher: int, program: str) -> set[int]:
    """Processes of the ranks under a launcher."""
    found = set()
    for child in psutil.Process(launcher).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            line = " ".join(child.cmdline())
            if program in line and "torch.distributed.run" not in line and "torchrun" not in line:
                found.add(child.pid)
    return found


def rank_1(pids: set[int]) -> int:
    return next(pid for pid in pids if psutil.Process(pid).environ().get("RANK") == "1")


if __name__ == "__main__":
    sys.exit(main())
