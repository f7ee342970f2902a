"""Bytes that a step communicates along each axis of the mesh, counted, against theory; and its time against DeepSpeed alone.

    python benchmarks/bench_parallel.py [--only CASE] [--rounds N]

Every collective of one step is counted where torch dispatches it (`c10d::*`), ours and DeepSpeed's alike. Volumes are those of
the ZeRO paper: an all-reduce counts its elements twice, a reduction, a reduce-scatter, a gathering (of what comes out), a
broadcast and an all-to-all once. The hand-written side (`hand_written.py`) trains the same model under the same layout with
nothing of ours in it; both sides run in processes of their own, in turns. Exit code 1 when a volume is more than 3 % from
theory; times have no target, since two ranks on two cores differ from run to run by more than what is looked for.
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
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import hand_written_options, machine, repeat_with, verdict

from anyshard.configs.compose import compose
from anyshard.configs.registry import register
from anyshard.offload.op_cache import op_env
from anyshard.trainer.callbacks.base import Callback

MAX_OFF_PCT = 3.0
STEPS, WARMUP = 14, 4
BATCH, SEQUENCE = 4, 128
MODEL = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}
BASE = [
    *("precision=fp32", "data=synthetic", "checkpoint=none", "train.eval_every_steps=0", "train.eval_samples=0", "model=hf"),
    f"data.sequence_length={SEQUENCE}",
    *("zero.param_persistence_threshold=0", "zero.max_reuse_distance=0", "zero.max_live_parameters=1"),  # as a large model
    f"train.max_steps={STEPS}",
    "train.log_every_steps=1000000",
    "+callbacks.counter={}",
    "model.config={" + ", ".join(f"{name}: {value}" for name, value in MODEL.items()) + "}",
]
WEIGHTS = {"allreduce": 2, "reduce": 1, "broadcast": 1, "allgather": 1, "reduce_scatter": 1, "alltoall": 1}


@dataclass(frozen=True)
class Case:
    """A layout; `tp` and `sp` beside `dp`, at a stage of ZeRO."""

    zero: int
    dp: int = 1
    tp: int = 1
    sp: int = 1

    @property
    def ranks(self) -> int:
        return self.dp * self.tp * self.sp

    def overrides(self) -> list[str]:
        """Each dp rank has the same micro-batch of one step, so that nothing is accumulated."""
        degrees = [f"parallel.tp={self.tp}", f"parallel.sp={self.sp}", f"launch.procs_per_node={self.ranks}"]
        sizes = [f"train.micro_batch_size={BATCH}", f"train.global_batch_size={BATCH * self.dp}"]
        return [*BASE, *degrees, *sizes, f"zero=z{self.zero}"]


CASES = {
    "dp2z0": Case(0, dp=2),
    "dp2z1": Case(1, dp=2),
    "dp2z2": Case(2, dp=2),
    "dp2z3": Case(3, dp=2),
    "tp2z1": Case(1, tp=2),
    "sp2z2": Case(2, sp=2),
    "sp2z3": Case(3, sp=2),
}


def num_params() -> int:
    h, f, layers, v = MODEL["hidden_size"], MODEL["intermediate_size"], MODEL["num_hidden_layers"], MODEL["vocab_size"]
    keys = h * MODEL["num_key_value_heads"] // MODEL["num_attention_heads"]
    return 2 * v * h + layers * (2 * h * h + 2 * h * keys + 3 * h * f + 2 * h) + h


def theory(case: Case) -> dict[str, float]:
    """Bytes of a step along each axis (4 bytes an element), of one rank."""
    h, layers, tokens = MODEL["hidden_size"], MODEL["num_hidden_layers"], BATCH * SEQUENCE
    keys = h * MODEL["num_key_value_heads"] // MODEL["num_attention_heads"]
    volumes: dict[str, float] = {}
    if case.dp * case.sp > 1:
        # at ZeRO 1 and 2 the paper has 2, but DeepSpeed 0.19.8 all-reduces buckets of gradients (2) where a reduction (1) would
        # do, and gathers weights (1): runtime/zero/stage_1_and_2.py:1695
        volumes["zero"] = (2 if case.zero == 0 else 3) * num_params() / case.tp
    if case.tp > 1:
        # four of the hidden states in each layer, that after the embedding and that of the gradient of the head's input,
        # and three of a number for each token in the loss
        volumes["tp"] = 2 * ((4 * layers + 2) * tokens * h + 3 * tokens)
    if case.sp > 1:
        volumes["sp"] = 2 * layers * (2 * h + 2 * keys) * tokens / case.sp
    return {axis: 4 * elements for axis, elements in volumes.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=CASES, help="one case instead of all")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side (default: 3; 1 counts bytes only)")
    parser.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side is not None:
        return {"ours": ours, "theirs": theirs}[args.side](CASES[args.only], args.folder)
    print(machine())
    met = [judge(name, args.rounds) for name in ([args.only] if args.only else CASES)]
    repeat_with()
    return 0 if all(met) else 1


def judge(name: str, rounds: int) -> bool:
    """Run one case and print it; returns whether its volumes are those of theory."""
    times: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as place:
        for number in range(rounds):
            folder = Path(place) / str(number)
            folder.mkdir()
            for side in ("ours", "theirs") if rounds > 1 else ("ours",):
                environment = {**os.environ, **op_env(), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
                torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
                command = [*torchrun, f"--nproc-per-node={CASES[name].ranks}", __file__, "--only", name]
                done = subprocess.run(
                    [*command, "--side", side, "--folder", str(folder)],
                    env=environment,
                    capture_output=True,
                    text=True,
                    check=False,
                )
                if done.returncode:
                    sys.exit(f"{name} ({side}) failed:\n{done.stderr[-4000:]}")
                times[side] += json.loads((folder / f"{side}.json").read_text())
        counted = json.loads((Path(place) / "0" / "bytes.json").read_text())
    print(f"{name}: one step communicates, in KiB: " + ", ".join(f"{axis} {n / 1024:.1f}" for axis, n in counted.items()))
    if times["theirs"]:
        sides = {side: statistics.median(values) * 1e3 for side, values in times.items()}
        print(
            f"  {sides['ours']:.2f} ms per step, hand-written {sides['theirs']:.2f} ms: {sides['ours'] / sides['theirs']:.3f}"
        )
    met = True
    for axis, expected in theory(CASES[name]).items():
        off_pct = 100 * abs(counted.get(axis, 0) / expected - 1)
        met &= verdict(f"  {name}: {axis}, from the {expected / 1024:.1f} KiB of theory", off_pct, MAX_OFF_PCT, unit="%")
    return met


def ours(case: Case, folder: Path) -> int:
    """One rank of a `fit` whose last step is counted."""
    from anyshard.trainer.fit import fit

    register("callback", "counter")(lambda: Counter(folder))
    fit(lambda: compose([*case.overrides(), f"run.dir={folder / 'run'}", f"data.cache_dir={folder / 'cache'}"]))
    return 0


class Counter(Callback):
    """Times the steps after the first ones, and counts what the last one communicates."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._last, self._times = folder, 0.0, []
        self._mode: Any = None

    def on_step_end(self, trainer: Any, record: dict[str, Any] | None) -> None:
        now, step = time.perf_counter(), trainer.progress.step
        if WARMUP < step < STEPS:
            self._times.append(now - self._last)
        if step == STEPS - 1:
            self._mode = counting(trainer.engine.groups)
            self._mode.__enter__()
        elif step == STEPS:
            self._mode.__exit__(None, None, None)
        self._last = time.perf_counter()

    def on_train_end(self, trainer: Any) -> None:
        if trainer.rank == 0:
            (self._folder / "bytes.json").write_text(json.dumps(self._mode.bytes))
            (self._folder / "ours.json").write_text(json.dumps(self._times))


def counting(groups: Any) -> Any:
    """A mode of torch that sums the bytes of collectives, by axis."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    names = {group.group_name: axis for axis, group in (("tp", groups.tp), ("sp", groups.sp)) if group is not None}

    class Counting(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.bytes: dict[str, int] = defaultdict(int)

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "c10d":
                self._count(func._schema.name.removeprefix("c10d::"), args)
            elif func.namespace == "deepspeed" and "all_to_all" in func._schema.name:  # its collective is inside, out of sight
                self.bytes[names[args[1]]] += size(args[0])
            return func(*args, **(kwargs or {}))

        def _count(self, name: str, args: Any) -> None:
            kind = name.strip("_").replace("_base", "").replace("_into_tensor_coalesced", "").replace("_tensor_coalesced", "")
            kind = kind.replace("_coalesced", "")
            if kind not in WEIGHTS:
                return
            group = next(torch.distributed.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject))
            # of gatherings what comes out, the first argument; of these two what goes in, the second
            tensors = args[1] if kind in ("reduce_scatter", "alltoall") else args[0]
            self.bytes[names.get(group.group_name, "zero")] += WEIGHTS[kind] * size(tensors)

    def size(tensors: Any) -> int:
        if isinstance(tensors, torch.Tensor):
            return tensors.numel() * tensors.element_size()
        return sum(map(size, tensors))

    return Counting()


def theirs(case: Case, folder: Path) -> int:
    """One rank of the hand-written loop."""
    import torch.distributed as dist
    from hand_written import HandWritten, Options, start

    config = compose([*case.overrides(), f"run.dir={folder / 'none'}"])
    ds_config = json.loads((folder / "run" / "ds_config.json").read_text())
    ds_config["train_batch_size"] = BATCH * case.dp
    (tokens,) = (folder / "cache").glob("tokens/*/train.bin")
    start()
    hand = HandWritten(Options(**hand_written_options(config, ds_config, tokens), tp=case.tp, sp=case.sp))
    times = []
    for step in range(STEPS):
        started = time.perf_counter()
        hand.train_step()
        if WARMUP < step + 1 < STEPS:
            times.append(time.perf_counter() - started)
    if dist.get_rank() == 0:
        (folder / "theirs.json").write_text(json.dumps(times))
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
