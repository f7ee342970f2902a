"""What a checkpoint costs training, beside torch.save, torch DCP, and what memory and disk allow.

    python benchmarks/bench_checkpoint.py [--model llama_125m] [--rounds N] [--steps N] [--folder DIR]

One process trains in fp32 at ZeRO 1. In every round each method saves the same tensors once and training goes on for some
steps, methods in turns, with steps without a save between them. "stall" is how long the call that saves holds training up;
"added" is how much longer the call and the steps after it took than as many steps without a save; "durable" is the time from
the call until the checkpoint is complete and synced (torch DCP does not sync its metadata: its figure is flattered); "CPU"
is processor time of the process beyond that of the steps. Medians with quartiles over the rounds. Exit code 1 when a target
is missed.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import machine, repeat_with, spread, verdict

from anyshard.configs.compose import compose
from anyshard.configs.registry import register
from anyshard.offload.op_cache import op_env
from anyshard.trainer.callbacks.base import Callback
from anyshard.trainer.checkpoint.staging import BLOCK_BYTES, StagingPool, blocks_for

MAX_STALL_MS = 5.0
MAX_ADDED_OF_MEMCPY = 1.2
MIN_FEWER_THAN_DCP = 10.0
MIN_FEWER_THAN_TORCH = 30.0
MIN_OF_DISK = 0.85

Wait = Callable[[], object]


@dataclass(frozen=True)
class State:
    """What every method saves: the same tensors, as live views."""

    trainer: Any
    folder: Path

    def tensors(self) -> dict[str, Any]:
        from anyshard.trainer.checkpoint import layout, optimizers

        engine = self.trainer.engine.ds
        fragments = optimizers.fragments(layout.slots(engine), layout.inner_optimizer(engine))
        return {f"{fragment.tensor.name} {fragment.tensor.key}": fragment.view for fragment in fragments}

    def manager(self) -> Any:
        return self.trainer.saves._manager


def nothing(state: State) -> Wait:
    return lambda: None


def ours(state: State) -> Wait:
    manager = state.manager()
    return manager.begin(state.trainer.engine.ds, step=state.trainer.progress.step, meta={}, rank_meta={}).result


def ours_waiting(state: State) -> Wait:
    manager = state.manager()
    manager.save(state.trainer.engine.ds, step=state.trainer.progress.step, meta={}, rank_meta={})
    return lambda: None


def torch_save(state: State) -> Wait:
    import torch

    with (state.folder / "torch.pt").open("wb") as file:
        torch.save(state.tensors(), file)
        file.flush()
        os.fsync(file.fileno())
    return lambda: None


def dcp(state: State) -> Wait:
    import torch.distributed.checkpoint

    torch.distributed.checkpoint.save(state.tensors(), checkpoint_id=state.folder / "dcp")
    return lambda: None


def dcp_async(state: State) -> Wait:
    import torch.distributed.checkpoint

    future: Any = torch.distributed.checkpoint.async_save(state.tensors(), checkpoint_id=state.folder / "dcp_async")
    return lambda: future.result()


METHODS = {
    "anyshard async": ours,
    "anyshard sync": ours_waiting,
    "torch.save + fsync": torch_save,
    "torch DCP": dcp,
    "torch DCP async": dcp_async,
}


class Turns(Callback):
    """Takes over after the first steps of a `fit`, and measures."""

    def __init__(self, rounds: int, steps: int, folder: Path) -> None:
        self.rounds, self.steps, self.folder = rounds, steps, folder
        self.results: dict[str, Any] = {name: [] for name in ("nothing", *METHODS)}
        self.floors: dict[str, list[float]] = {"memcpy": [], "disk": []}
        self.num_bytes = 0
        self.done = False

    def on_step_end(self, trainer: Any, record: dict[str, Any] | None) -> None:
        if self.done or trainer.progress.step < 3:
            return
        self.done = True
        state = State(trainer, self.folder)
        self.num_bytes = sum(view.nbytes for view in state.tensors().values())
        for number in range(-1, self.rounds):  # the first round warms up
            floors = {"memcpy": self._memcpy(state), "disk": self._disk()}
            names = list(METHODS)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                for method in ("nothing", name):
                    figures = self._measure(state, METHODS.get(method, nothing))
                    if number >= 0:
                        self.results[method].append(figures)
            for name, seconds in floors.items():
                if number >= 0:
                    self.floors[name].append(seconds)
        (self.folder / "times.json").write_text(json.dumps([self.results, self.floors, self.num_bytes]))

    def _measure(self, state: State, method: Callable[[State], Wait]) -> dict[str, float]:
        gc.collect()
        cpu, started = time.process_time(), time.perf_counter()
        wait = method(state)
        stall = time.perf_counter() - started
        durable = None
        for _ in range(self.steps):
            state.trainer._step()
        wall, guard = time.perf_counter() - started, state.manager().take_guard_stall_s()
        wait()
        done = time.perf_counter() - started
        cpu = time.process_time() - cpu
        durable = stall if method not in (ours, dcp_async) else done
        if method is ours:
            events = (state.trainer.run_dir / "events.jsonl").read_text().splitlines()
            durable = next(event["seconds"] for event in map(json.loads, reversed(events)) if event["event"] == "commit")
        for path in self.folder.glob("*dcp*"):
            shutil.rmtree(path)
        return {"stall": stall + guard, "begin": stall, "wall": wall, "durable": durable, "cpu": cpu}

    def _memcpy(self, state: State) -> float:
        """Copying the same bytes, by one thread, to as much memory whose pages are there."""
        views = list(state.tensors().values())
        target = StagingPool(blocks_for(self.num_bytes))
        target.prepare(target.max_blocks)
        blocks = [target.acquire(lambda: False) for _ in range(target.max_blocks)]
        started = time.perf_counter()
        for view in views:
            for start in range(0, view.nbytes, BLOCK_BYTES):
                block = blocks[start // BLOCK_BYTES % len(blocks)]
                ctypes.memmove(block.address, view.data_ptr() + start, min(BLOCK_BYTES, view.nbytes - start))
            blocks = blocks[blocks_for(view.nbytes) :] + blocks[: blocks_for(view.nbytes)]
        return time.perf_counter() - started

    def _disk(self) -> float:
        """`dd` of as many bytes, past the page cache, synced."""
        path = self.folder / "dd"
        count = -(-self.num_bytes // 2**24)
        started = time.perf_counter()
        subprocess.run(
            ["dd", "if=/dev/zero", f"of={path}", "bs=16M", f"count={count}", "oflag=direct", "conv=fsync"],
            check=True,
            capture_output=True,
        )
        seconds = time.perf_counter() - started
        path.unlink()
        return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama_125m", help="a model preset (default: llama_125m)")
    parser.add_argument("--rounds", type=int, default=5, help="saves by each method (default: 5)")
    parser.add_argument("--steps", type=int, default=5, help="steps after each save (default: 5)")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        return worker(args)
    print(machine())
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        environment = {**os.environ, **op_env(), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "2"}
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", folder]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"it failed:\n{done.stderr[-4000:]}")
        results, floors, num_bytes = json.loads((Path(folder) / "times.json").read_text())
    met = judge(results, floors, num_bytes, args.steps)
    repeat_with()
    return 0 if met else 1


def judge(results: dict[str, Any], floors: dict[str, list[float]], num_bytes: int, steps: int) -> bool:
    """Print everything; returns whether the targets are met."""
    plain = {key: statistics.median(figures[key] for figures in results["nothing"]) for key in ("wall", "cpu")}
    memcpy, disk = (statistics.median(floors[name]) for name in ("memcpy", "disk"))
    print(f"{num_bytes / 1e9:.3f} GB of state, {steps} steps take {plain['wall']:.2f} s; {machine()}")
    print(f"  steps without a save: {spread([figures['wall'] for figures in results['nothing']])} s")
    print(f"  memcpy {spread(floors['memcpy'])} s; dd direct {spread(floors['disk'])} s, {num_bytes / disk / 1e9:.2f} GB/s")
    added = {}
    for name in METHODS:
        extra = [figures["wall"] - plain["wall"] for figures in results[name]]
        added[name] = statistics.median(extra)
        durable = statistics.median(figures["durable"] for figures in results[name])
        print(f"  {name}:")
        print(f"    stall {spread([figures['stall'] * 1e3 for figures in results[name]])} ms", end="")
        print(f", of which the call {statistics.median(figures['begin'] for figures in results[name]) * 1e3:.4g} ms")
        print(f"    added {spread(extra)} s, {added[name] / memcpy:.2f} x memcpy")
        print(
            f"    durable {spread([figures['durable'] for figures in results[name]])} s, {num_bytes / durable / 1e9:.2f} GB/s"
        )
        print(f"    CPU {spread([figures['cpu'] - plain['cpu'] for figures in results[name]])} s")
    mine = results["anyshard async"]
    least = max(added["anyshard async"], 1e-3)
    stall = verdict("  stall", statistics.median(each["stall"] for each in mine) * 1e3, MAX_STALL_MS, unit="ms")
    floor = verdict("  added", added["anyshard async"] / memcpy, MAX_ADDED_OF_MEMCPY, unit="x memcpy")
    durable = statistics.median(each["durable"] for each in mine)
    rate = verdict("  disk's time over ours, inverted", durable / disk, 1 / MIN_OF_DISK, unit="x dd")
    fewer = [
        verdict(f"  added, of that of {name}", least / added[name], 1 / target, unit="x")
        for name, target in (("torch DCP async", MIN_FEWER_THAN_DCP), ("torch.save + fsync", MIN_FEWER_THAN_TORCH))
    ]
    return all([stall, floor, rate, *fewer])


def worker(args: argparse.Namespace) -> int:
    """Train, and measure between steps."""
    from anyshard.trainer.fit import fit

    turns = Turns(args.rounds, args.steps, args.worker)
    register("callback", "turns")(lambda: turns)
    overrides = [
        f"model={args.model}",
        "precision=fp32",
        "data=synthetic",
        "data.sequence_length=64",
        "train.global_batch_size=1",
        "train.micro_batch_size=1",
        "train.max_steps=4",
        "train.log_every_steps=1000000",
        "train.eval_samples=0",
        "checkpoint.at_end=false",
        "checkpoint.every_steps=1000000",
        "checkpoint.keep=1",
        f"run.dir={args.worker / 'run'}",
        f"data.cache_dir={args.worker / 'cache'}",
        "+callbacks.turns={}",
    ]
    fit(lambda: compose(overrides))
    return 0


if __name__ == "__main__":
    sys.exit(main())
