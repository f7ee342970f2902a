"""The index of a checkpoint of 10^12 parameters on 16,384 ranks: its size, and the time to plan a save and a restore.

    python benchmarks/bench_index.py

No tensor is made. The manifests are those that the ranks would write, with random checksums; they are made, written, read,
checked and planned with by the code that checkpoints use. Assumptions: the transformer of 1008B parameters of Narayanan et
al. 2021, table 1 (128 layers, width 25,600, vocabulary 51,200), AdamW with fp32 masters (12 bytes a parameter), saved at tp 8,
pp 64, dp 32 with ZeRO 1 and restored at tp 4, pp 32, dp 128 with ZeRO 1. One process does what one rank in the middle does; the
index is in memory (/dev/shm), so the times are those of the code and not of a file system, which has to serve the index to
every rank. All of it is one thread that waits for nothing, so the seconds are of processor time. Exit code 1 when a target is
missed.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from common import machine, repeat_with, verdict

from anyshard.trainer.checkpoint.boxes import Box, box_numel
from anyshard.trainer.checkpoint.catalog import index_chunks, read_commit, read_manifests
from anyshard.trainer.checkpoint.layout import Fragment
from anyshard.trainer.checkpoint.manifest import (
    COMMIT,
    Chunk,
    Commit,
    FileRef,
    Manifest,
    Scalar,
    Tensor,
    data_name,
    digest,
    dump_commit,
    dump_manifest,
    manifest_name,
)
from anyshard.trainer.checkpoint.reader import plan_reads
from anyshard.trainer.checkpoint.snapshot import cut
from anyshard.trainer.checkpoint.staging import BLOCK_BYTES
from anyshard.trainer.checkpoint.writer import CHUNK_BYTES

NUM_LAYERS, WIDTH, VOCABULARY = 128, 25_600, 51_200
STATES = ("param", "exp_avg", "exp_avg_sq")
MAX_INDEX_PCT = 0.1
MAX_PLAN_S = 10.0
Result = TypeVar("Result")


@dataclass(frozen=True)
class Layout:
    tp: int
    pp: int
    dp: int

    @property
    def num_ranks(self) -> int:
        return self.tp * self.pp * self.dp


def parameters(stage: int, pp: int) -> Iterator[tuple[str, tuple[int, ...], int | None]]:
    """(name, shape, dim that tensor parallelism cuts) of what a pipeline stage holds."""
    if stage == 0:
        yield "embed.weight", (VOCABULARY, WIDTH), 0
    for layer in range(NUM_LAYERS * stage // pp, NUM_LAYERS * (stage + 1) // pp):
        prefix = f"model.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj"):
            yield f"{prefix}self_attn.{name}.weight", (WIDTH, WIDTH), 0
        yield f"{prefix}self_attn.o_proj.weight", (WIDTH, WIDTH), 1
        yield f"{prefix}mlp.up_proj.weight", (4 * WIDTH, WIDTH), 0
        yield f"{prefix}mlp.down_proj.weight", (WIDTH, 4 * WIDTH), 1
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}{name}.weight", (WIDTH,), None
    if stage == pp - 1:
        yield "norm.weight", (WIDTH,), None


def held(layout: Layout, rank: int) -> list[Fragment]:
    """What a rank holds under ZeRO 1: its part of the line of its stage's shards, a line for each group."""
    tp_rank, dp_rank, stage = rank % layout.tp, rank // layout.tp % layout.dp, rank // (layout.tp * layout.dp)
    found = []
    for decay in (True, False):
        shards: list[tuple[str, tuple[int, ...], Box]] = []
        for name, shape, cut_dim in parameters(stage, layout.pp):
            if (len(shape) > 1) is decay:
                box = [(0, size) for size in shape]
                if cut_dim is not None:
                    box[cut_dim] = (shape[cut_dim] * tp_rank // layout.tp, shape[cut_dim] * (tp_rank + 1) // layout.tp)
                shards.append((name, shape, tuple(box)))
        total = sum(box_numel(box) for _, _, box in shards)
        begin, end, offset = total * dp_rank // layout.dp, total * (dp_rank + 1) // layout.dp, 0
        for name, shape, box in shards:
            start, stop = max(begin - offset, 0), min(end - offset, box_numel(box))
            if start < stop and (cut_needed(box, shape) or tp_rank == 0):  # what tp ranks hold alike, one of them writes
                view = torch.empty(stop - start, device="meta")
                found += [Fragment(Tensor(name, key, "float32", shape), start, view, False, shard=box) for key in STATES]
            offset += box_numel(box)
    return found


def cut_needed(box: Box, shape: tuple[int, ...]) -> bool:
    """Whether tensor parallelism cuts this parameter."""
    return any(stop - start != size for (start, stop), size in zip(box, shape, strict=True))


def manifest_of(rank: int, fragments: list[Fragment]) -> tuple[bytes, int]:
    """The manifest of a rank, as JSON, and the size of its data."""
    blocks, num_bytes = cut(fragments, CHUNK_BYTES, BLOCK_BYTES)
    chunks = [
        Chunk(
            piece.fragment.tensor,
            piece.fragment.box,
            piece.fragment.start + piece.start,
            piece.numel,
            data_name(rank),
            piece.offset,
            piece.nbytes,
            os.urandom(16).hex(),
        )
        for pieces in blocks
        for piece in pieces
    ]
    names = tuple(dict.fromkeys(fragment.tensor.name for fragment in fragments))
    scalars = [Scalar("step", "float32", 1000.0, names)]
    return dump_manifest(Manifest(rank, data_name(rank), num_bytes, chunks, scalars, {})), num_bytes


def write_index(layout: Layout, directory: Path) -> tuple[int, int]:
    """Write the manifests of all ranks and COMMIT; returns the size of the index and that of the data."""
    refs, data_bytes = [], 0
    for rank in range(layout.num_ranks):
        manifest, num_bytes = manifest_of(rank, held(layout, rank))
        (directory / manifest_name(rank)).write_bytes(manifest)
        refs.append(FileRef(manifest_name(rank), len(manifest), digest(manifest)))
        data_bytes += num_bytes
    counters = {"global_steps": 1000, "skipped_steps": 0, "optimizer_steps": 1000, "loss_scaler": None}
    optimizer = {"class": "AdamW", "kind": "adam", "groups": {}}
    commit = dump_commit(Commit(1000, "", {}, {}, counters, optimizer, {}, {}, refs))
    (directory / COMMIT).write_bytes(commit)
    return len(commit) + sum(ref.nbytes for ref in refs), data_bytes


def timed(what: str, work: Callable[[], Result]) -> tuple[Result, float]:
    """The result of some work, and its seconds, printed."""
    started = time.process_time()
    result = work()
    seconds = time.process_time() - started
    print(f"  {what}: {seconds:.3g} s", flush=True)
    return result, seconds


def main() -> int:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    saved, restored = Layout(tp=8, pp=64, dp=32), Layout(tp=4, pp=32, dp=128)
    num_parameters = sum(math.prod(shape) for stage in range(64) for _, shape, _ in parameters(stage, 64))
    print(f"{machine()}; {num_parameters / 1e9:,.0f}B parameters, {saved.num_ranks:,} ranks")
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else None) as folder:
        directory = Path(folder)
        middle = saved.num_ranks // 2
        print("a save, one rank")
        fragments, _ = timed("which parts of which tensors", lambda: held(saved, middle))
        _, save_s = timed("chunks and manifest", lambda: manifest_of(middle, fragments))
        (index_bytes, data_bytes), _ = timed(
            "the manifests of all ranks, one after the other", lambda: write_index(saved, directory)
        )
        print(f"  index {index_bytes / 2**20:.1f} MiB for {data_bytes / 2**40:.2f} TiB of data")
        print("a restore, one rank")
        commit, commit_s = timed("COMMIT", lambda: read_commit(directory))
        manifests, manifests_s = timed("manifests, read and checked", lambda: read_manifests(directory, commit))
        index, index_s = timed("every tensor whole", lambda: index_chunks(manifests))
        targets = held(restored, restored.num_ranks // 2)
        reads, plan_s = timed("which chunks to read", lambda: plan_reads(targets, index))
        chunks = [chunk for several in reads.values() for chunk, _ in several]
        read_mib, held_mib = sum(chunk.nbytes for chunk in chunks) / 2**20, sum(4 * target.numel for target in targets) / 2**20
        print(f"  {len(chunks)} chunks of {len(reads)} files, {read_mib:.0f} MiB for the {held_mib:.0f} MiB that it holds")
    met = [
        verdict("index, share of the data", 100 * index_bytes / data_bytes, MAX_INDEX_PCT, unit="%"),
        verdict("planning a save", save_s, MAX_PLAN_S, unit="s"),
        verdict("planning a restore", commit_s + manifests_s + index_s + plan_s, MAX_PLAN_S, unit="s"),
    ]
    repeat_with()
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
