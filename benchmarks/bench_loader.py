"""The data loader against raw np.memmap slicing, seeking in a file of 10^9 tokens, and the size of the loader's state.

    python benchmarks/bench_loader.py [--rounds 20] [--sequence-length 1024] [--micro-batch-size 8]

Both sides read the same file in the same process, in alternating rounds, and give torch tensors of inputs and labels:
the raw side slices the map and stacks, one round over random offsets, as small training scripts do. Targets: at least
0.9x of it, a seek within 50 ms, a state below 1 KB. Exit code 1 when one is missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from anyshard.trainer.batch import BatchPlan
from anyshard.trainer.data.loader import Loader, collate_tokens
from anyshard.trainer.data.order import SampleOrder
from anyshard.trainer.data.tokens import TokenDataset, TokenMeta

_STEPS_PER_ROUND = 50
_ACCUMULATION = 4
_SPARSE_TOKENS = 10**9
_FAR_STEP = 10**9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    plan = BatchPlan(
        global_batch_size=args.micro_batch_size * _ACCUMULATION,
        micro_batch_size=args.micro_batch_size,
        accumulation_steps=_ACCUMULATION,
        dp=1,
    )
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        for separate in (False, True):
            for prefetch in (False, True):
                ratio = throughput(Path(folder), args, plan, separate=separate, prefetch=prefetch)
                # raw slicing gives no document boundaries, so only the plain stream is comparable with it
                ratios += [] if separate else [ratio]
        seek_ms = seek(Path(folder), args.sequence_length, plan)
    state_bytes = len(json.dumps({"samples": _FAR_STEP * plan.global_batch_size}))
    print(f"seek to step 10^9 in 10^9 tokens, opening the file and the first batch included: {seek_ms:.2f} ms (target <= 50)")
    print(f"loader state in a checkpoint: {state_bytes} bytes (target < 1024)")
    print(f"repeat with: {' '.join(['python', *sys.argv])}")
    return 0 if min(ratios) >= 0.9 and seek_ms <= 50 and state_bytes < 1024 else 1


def throughput(folder: Path, args: argparse.Namespace, plan: BatchPlan, *, separate: bool, prefetch: bool) -> float:
    """Print the tokens per second of both sides; returns ours over raw, the median of the rounds' ratios."""
    length, num_tokens = args.sequence_length, 50_000_000
    write(folder, num_tokens, sparse=False)
    dataset = TokenDataset.open(folder, "train", sequence_length=length, separate_documents=separate)
    order = SampleOrder(len(dataset), seed=1, shuffle=True)
    loader = Loader(dataset, collate=collate_tokens, order=order, batch=plan, dp_rank=0, device="cpu", prefetch=prefetch)
    raw = np.memmap(folder / "train.bin", dtype=np.uint16, mode="r")
    random = np.random.default_rng(1)
    position, tokens = 0, _STEPS_PER_ROUND * plan.global_batch_size * length
    ours, theirs = [], []
    for number in range(args.rounds + 1):
        start = time.perf_counter()
        for _ in range(_STEPS_PER_ROUND):
            loader.step(position)
            position += plan.global_batch_size
        middle = time.perf_counter()
        for _ in range(_STEPS_PER_ROUND * plan.accumulation_steps):
            slice_and_stack(raw, random.integers(0, num_tokens - length - 1, plan.micro_batch_size), length)
        end = time.perf_counter()
        if number:  # the first round warms both
            ours.append(tokens / (middle - start))
            theirs.append(tokens / (end - middle))
    loader.close()
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    print(
        f"pack={'documents' if separate else 'stream':9} prefetch={'on' if prefetch else 'off':3} "
        f"loader {statistics.median(ours) / 1e6:7.1f}M tokens/s, raw memmap {statistics.median(theirs) / 1e6:7.1f}M tokens/s, "
        f"ratio {ratio:.2f}{'' if separate else ' (target >= 0.9)'}"
    )
    return ratio


def slice_and_stack(raw: np.memmap, offsets: np.ndarray, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.stack([torch.from_numpy(raw[i : i + length].astype(np.int64)) for i in offsets])
    labels = torch.stack([torch.from_numpy(raw[i + 1 : i + 1 + length].astype(np.int64)) for i in offsets])
    return inputs, labels


def seek(folder: Path, length: int, plan: BatchPlan) -> float:
    """Milliseconds from a cold start to the batch of a far step, in a sparse file of 10^9 tokens; the worst of five."""
    write(folder, _SPARSE_TOKENS, sparse=True)
    worst = 0.0
    for number in range(5):
        start = time.perf_counter()
        dataset = TokenDataset.open(folder, "train", sequence_length=length, separate_documents=True)
        order = SampleOrder(len(dataset), seed=number, shuffle=True)
        loader = Loader(dataset, collate=collate_tokens, order=order, batch=plan, dp_rank=0, device="cpu")
        loader.step(_FAR_STEP * plan.global_batch_size)
        worst = max(worst, time.perf_counter() - start)
        loader.close()
    return worst * 1e3


def write(folder: Path, num_tokens: int, *, sparse: bool) -> None:
    """A token file of documents of 1000 tokens; sparse ones take no space on the disk."""
    with (folder / "train.bin").open("wb") as file:
        if sparse:
            file.truncate(num_tokens * 2)
        else:
            file.write(np.random.default_rng(0).integers(0, 50_000, num_tokens, dtype=np.uint16).data)
    ends = np.arange(1000, num_tokens + 1, 1000, dtype=np.int64)
    (folder / "train.ends").write_bytes(ends.tobytes())
    (folder / "validation.bin").touch()
    (folder / "validation.ends").touch()
    TokenMeta("uint16", {"train": num_tokens, "validation": 0}, {"train": len(ends), "validation": 0}).save(folder)


if __name__ == "__main__":
    sys.exit(main())
