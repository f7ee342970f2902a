"""What a checkpoint costs training, beside torch.save, torch DCP, DeepSpeed, and what memory and disk allow.

    python benchmarks/bench_checkpoint.py [--size SIZE] [--rounds N] [--steps N] [--only METHOD ...] [--folder DIR]

One process trains in fp32 at ZeRO 1. In every round each method saves the same tensors once and training goes on for some
steps, methods in turns, each after as many steps without a save. "stall" is how long the call that saves holds training up;
"added" is how much longer the call and the steps after it took than the steps without a save just before; "durable" is the
time from the call until the checkpoint is complete and synced (torch DCP does not sync its metadata: its figure is
flattered); "CPU" is processor time of the process beyond that of the steps, "thread" that of the training thread in the
call, and "host memory" what the process takes at most beyond what it had (ours with the staging memory that it keeps). With
"ds_to_universal" DeepSpeed's checkpoint is converted by a process of its own after the steps; "durable" is the call and the
conversion (neither syncs: flattered). Afterwards each checkpoint is restored, its pages dropped from the cache before, beside
`dd` of the same bytes. Medians with quartiles over the rounds. Exit code 1 when a target is missed.
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
import threading
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
MIN_OF_READ = 0.8
MAX_OF_UNIVERSAL = 0.1
SIZES = {"tiny": "tiny", "15m": "llama_15m", "125m": "llama_125m", "350m": "llama_350m"}

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


def deepspeed_save(state: State) -> Wait:
    engine = state.trainer.engine.ds
    engine.module.universal_checkpoint_info = {"universal_checkpoint_version": 0.4}  # ds_to_universal refuses without
    engine.save_checkpoint(str(state.folder / "deepspeed"), tag="t")
    return lambda: None


def universal(state: State) -> Wait:
    deepspeed_save(state)
    folder = state.folder / "deepspeed"
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--no_strict"]
    folders = ["--input_folder", str(folder / "t"), "--output_folder", str(folder / "t_universal")]
    workers = ["--num_extract_workers", "2", "--num_merge_workers", "2"]
    return lambda: _convert([*command, *folders, *workers])


def _convert(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ds_to_universal failed:\n{done.stderr[-2000:]}")


METHODS = {
    "anyshard async": ours,
    "anyshard sync": ours_waiting,
    "torch.save + fsync": torch_save,
    "torch DCP": dcp,
    "torch DCP async": dcp_async,
    "DeepSpeed": deepspeed_save,
    "DeepSpeed + ds_to_universal": universal,
}
KEPT = {"anyshard async": "run/checkpoints", "torch.save + fsync": "torch.pt", "torch DCP": "dcp", "DeepSpeed": "deepspeed"}
"""Method -> what it leaves, for the restores."""


def restore_ours(state: State, path: Path, *, verify: bool = True) -> None:
    manager = state.manager()
    manager._verify = verify
    manager.restore(state.trainer.engine.ds, max(path.glob("step-*")))
    manager._verify = True


def restore_ours_unverified(state: State, path: Path) -> None:
    restore_ours(state, path, verify=False)


def restore_torch(state: State, path: Path) -> None:
    import torch

    stored = torch.load(path, weights_only=True)
    for name, view in state.tensors().items():
        view.copy_(stored[name])


def restore_dcp(state: State, path: Path) -> None:
    import torch.distributed.checkpoint

    torch.distributed.checkpoint.load(state.tensors(), checkpoint_id=path)


def restore_deepspeed(state: State, path: Path) -> None:
    loaded, _ = state.trainer.engine.ds.load_checkpoint(str(path), tag="t")
    assert loaded is not None


RESTORES = {
    "anyshard": ("anyshard async", restore_ours),
    "anyshard, not verified": ("anyshard async", restore_ours_unverified),
    "torch.load": ("torch.save + fsync", restore_torch),
    "torch DCP": ("torch DCP", restore_dcp),
    "DeepSpeed": ("DeepSpeed", restore_deepspeed),
}


class Peak:
    """How far the memory of this process rises above what it is now."""

    def __init__(self) -> None:
        self._before, self._highest = _resident_bytes(), 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stopped.wait(0.02):
            self._highest = max(self._highest, _resident_bytes())

    def stop(self) -> int:
        self._stopped.set()
        self._thread.join()
        return max(0, self._highest - self._before)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Turns(Callback):
    """Takes over after the first steps of a `fit`, and measures."""

    def __init__(self, rounds: int, steps: int, folder: Path, only: list[str]) -> None:
        self.rounds, self.steps, self.folder = rounds, steps, folder
        self.methods = [name for name in METHODS if not only or name in only]
        self.results: dict[str, Any] = {name: [] for name in ("nothing", *self.methods)}
        self.restores: dict[str, list[tuple[float, int]]] = {}
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
            print(f"saves: round {number + 1} of {self.rounds}", file=sys.stderr, flush=True)
            floors = {"memcpy": self._memcpy(state), "disk": self._disk()}
            names = self.methods
            for name in names[number % len(names) :] + names[: number % len(names)]:
                plain = self._measure(state, nothing)
                figures = self._measure(state, METHODS[name]) | {"plain": plain["wall"]}
                if number >= 0:
                    self.results["nothing"].append(plain)
                    self.results[name].append(figures)
            for name, seconds in floors.items():
                if number >= 0:
                    self.floors[name].append(seconds)
        self._restore(state)
        (self.folder / "times.json").write_text(json.dumps([self.results, self.floors, self.num_bytes, self.restores]))

    def _restore(self, state: State) -> None:
        """Every method saves once more, and each checkpoint is restored in turns."""
        kept = {method: self.folder / path for method, path in KEPT.items() if method in self.methods}
        for method in kept:
            METHODS[method](state)()
        cases = {"dd": ("anyshard async", _read)} | RESTORES
        cases = {name: case for name, case in cases.items() if case[0] in kept}
        self.restores = {name: [] for name in cases}
        for number in range(-1, self.rounds):
            print(f"restores: round {number + 1} of {self.rounds}", file=sys.stderr, flush=True)
            for name, (method, restore) in cases.items():
                num_bytes = _forget(kept[method])
                gc.collect()
                started = time.perf_counter()
                restore(state, kept[method])
                if number >= 0:
                    self.restores[name].append((time.perf_counter() - started, num_bytes))

    def _measure(self, state: State, method: Callable[[State], Wait]) -> dict[str, float]:
        gc.collect()
        peak = Peak()
        cpu, thread, started = time.process_time(), time.thread_time(), time.perf_counter()
        wait = method(state)
        stall, thread = time.perf_counter() - started, time.thread_time() - thread
        durable = None
        for _ in range(self.steps):
            state.trainer._step()
        wall, guard = time.perf_counter() - started, state.manager().take_guard_stall_s()
        wait()
        done = time.perf_counter() - started
        cpu = time.process_time() - cpu
        durable = done if method in (ours, dcp_async) else stall + (done - wall if method is universal else 0)
        if method is ours:
            events = (state.trainer.run_dir / "events.jsonl").read_text().splitlines()
            durable = next(event["seconds"] for event in map(json.loads, reversed(events)) if event["event"] == "commit")
        for path in (*self.folder.glob("*dcp*"), *self.folder.glob("deepspeed")):
            shutil.rmtree(path)
        memory = peak.stop() + (state.manager()._saver._pool.num_bytes if method in (ours, ours_waiting) else 0)
        times = {"stall": stall + guard, "begin": stall, "thread": thread, "wall": wall, "durable": durable, "cpu": cpu}
        return times | {"memory": memory}

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


def _read(state: State, path: Path) -> None:
    """`dd` of the data files, past the page cache."""
    for file in max(path.glob("step-*")).glob("*.bin"):
        command = ["dd", f"if={file}", "of=/dev/null", "bs=16M", "iflag=direct"]
        subprocess.run(command, check=True, capture_output=True)


def _forget(path: Path) -> int:
    """Drop a checkpoint from the page cache; returns its size."""
    num_bytes = 0
    for file in [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            num_bytes += os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)
    return num_bytes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="125m", help="of the model (default: 125m)")
    parser.add_argument("--only", nargs="+", choices=METHODS, default=[], help="methods to measure (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="saves by each method (default: 5)")
    parser.add_argument("--steps", type=int, default=5, help="steps after each save (default: 5)")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--plot", type=Path, help="draw stall and time to durable into this PNG")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds: quartiles need at least 2")
    if args.worker is not None:
        return worker(args)
    print(machine())
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        environment = {**os.environ, **op_env(), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "2"}
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", folder]
        done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False)
        if done.returncode:
            sys.exit(f"it failed with exit code {done.returncode}; what it said is above")
        results, floors, num_bytes, restores = json.loads((Path(folder) / "times.json").read_text())
    met = [judge(results, floors, num_bytes, args.steps), judge_restores(restores)]
    if args.plot is not None:
        draw(results, num_bytes, args.plot)
    repeat_with()
    return 0 if all(met) else 1


def judge(results: dict[str, Any], floors: dict[str, list[float]], num_bytes: int, steps: int) -> bool:
    """Print everything; returns whether the targets are met."""
    plain = {key: statistics.median(figures[key] for figures in results["nothing"]) for key in ("wall", "cpu")}
    memcpy, disk = (statistics.median(floors[name]) for name in ("memcpy", "disk"))
    print(f"{num_bytes / 1e9:.3f} GB of state, {steps} steps take {plain['wall']:.2f} s; {machine()}")
    print(f"  steps without a save: {spread([figures['wall'] for figures in results['nothing']])} s")
    print(f"  memcpy {spread(floors['memcpy'])} s; dd direct {spread(floors['disk'])} s, {num_bytes / disk / 1e9:.2f} GB/s")
    added = {}
    for name in (name for name in results if name != "nothing"):
        extra = [figures["wall"] - figures["plain"] for figures in results[name]]
        added[name] = statistics.median(extra)
        durable = statistics.median(figures["durable"] for figures in results[name])
        print(f"  {name}:")
        print(f"    stall {spread([figures['stall'] * 1e3 for figures in results[name]])} ms", end="")
        print(f", of which the call {statistics.median(figures['begin'] for figures in results[name]) * 1e3:.4g} ms", end="")
        print(f"; thread {spread([figures['thread'] * 1e3 for figures in results[name]])} ms")
        print(f"    added {spread(extra)} s, {added[name] / memcpy:.2f} x memcpy")
        print(
            f"    durable {spread([figures['durable'] for figures in results[name]])} s, {num_bytes / durable / 1e9:.2f} GB/s"
        )
        print(f"    CPU {spread([figures['cpu'] - plain['cpu'] for figures in results[name]])} s", end="")
        print(f"; host memory {statistics.median(figures['memory'] for figures in results[name]) / num_bytes:.2f} x the state")
    if "anyshard async" not in results:
        return True
    mine = results["anyshard async"]
    least = max(added["anyshard async"], 1e-3)
    stall = verdict("  stall", statistics.median(each["stall"] for each in mine) * 1e3, MAX_STALL_MS, unit="ms")
    floor = verdict("  added", added["anyshard async"] / memcpy, MAX_ADDED_OF_MEMCPY, unit="x memcpy")
    durable = statistics.median(each["durable"] for each in mine)
    rate = verdict("  disk's time over ours, inverted", durable / disk, 1 / MIN_OF_DISK, unit="x dd")
    fewer = [
        verdict(f"  added, of that of {name}", least / added[name], 1 / target, unit="x")
        for name, target in (("torch DCP async", MIN_FEWER_THAN_DCP), ("torch.save + fsync", MIN_FEWER_THAN_TORCH))
        if name in added
    ]
    if "DeepSpeed + ds_to_universal" in results:
        theirs = statistics.median(each["durable"] for each in results["DeepSpeed + ds_to_universal"])
        fewer.append(verdict("  durable, of that of ds_to_universal", durable / theirs, MAX_OF_UNIVERSAL, unit="x"))
    return all([stall, floor, rate, *fewer])


def judge_restores(restores: dict[str, list[tuple[float, int]]]) -> bool:
    """Print how fast checkpoints are restored; returns whether the target is met."""
    print("restores, from the disk:")
    for name, measured in restores.items():
        seconds, num_bytes = [each[0] for each in measured], measured[0][1]
        print(f"  {name}: {spread(seconds)} s, {num_bytes / statistics.median(seconds) / 1e9:.2f} GB/s")
    if "anyshard" not in restores:
        return True
    mine, disk = (statistics.median(each[0] for each in restores[name]) for name in ("anyshard", "dd"))
    return verdict("  verified restore, of the time of dd", mine / disk, 1 / MIN_OF_READ, unit="x")


def draw(results: dict[str, Any], num_bytes: int, path: Path) -> None:
    """One bar for how long training stands still, one for how long until the checkpoint is safe, per method."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [name for name in results if name != "nothing"][::-1]
    figure = Figure(figsize=(8, 0.62 * len(names) + 1.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, label, color, shift in (
        ("durable", "until the checkpoint is safe on the disk", "#c7d3e3", -0.19),
        ("stall", "training stands still", "#c8553d", 0.19),
    ):
        seconds = [statistics.median(figures[key] for figures in results[name]) for name in names]
        bars = axes.barh([place + shift for place in range(len(names))], seconds, height=0.36, color=color, label=label)
        axes.bar_label(
            bars, [f"{each * 1e3:.3g} ms" if each < 1 else f"{each:.3g} s" for each in seconds], padding=4, fontsize=9
        )
    axes.set_xscale("log")
    axes.margins(x=0.18)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("seconds, logarithmic")
    axes.set_title(f"One checkpoint of {num_bytes / 1e9:.2f} GB", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9, reverse=True)
    figure.savefig(path, dpi=150)


def worker(args: argparse.Namespace) -> int:
    """Train, and measure between steps."""
    from anyshard.trainer.fit import fit

    turns = Turns(args.rounds, args.steps, args.worker, args.only)
    register("callback", "turns")(lambda: turns)
    overrides = [
        f"model={SIZES[args.size]}",
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
