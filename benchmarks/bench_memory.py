"""Predicted against measured peak memory of a rank on a CPU, over stages, tiers, types and models.

Every case is a run of `anyshard train` of a few steps. The measured figure is the largest resident set of rank 0 (`ru_maxrss`,
`mem/peak_gib` of its metrics); the prediction is that of plan.json, written before the run.
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

from common import machine, repeat_with, verdict

GIB = 2**30
COMMON = [
    "data=synthetic",
    "train.log_every_steps=1",
    "train.eval_samples=0",
    "checkpoint.every_steps=0",
    "checkpoint.at_end=false",
    "train.max_steps=3",
    "offload.buffers_gib=0.5",
]
MODELS = {
    "15m": ["model=llama_15m", "data.sequence_length=256", "train.micro_batch_size=4"],
    "40m": ["model=llama_15m", "model.config.num_hidden_layers=12", "data.sequence_length=128", "train.micro_batch_size=2"],
    "125m": ["model=llama_125m", "data.sequence_length=64", "train.micro_batch_size=1"],
}
CASES = [
    ("15m", "z0", "none", "fp32", 1, ()),
    ("15m", "z1", "none", "fp32", 2, ()),
    ("15m", "z2", "none", "bf16", 2, ()),
    ("15m", "z3", "none", "fp32", 1, ()),
    ("15m", "z3", "nvme_param", "fp32", 2, ()),
    ("40m", "z0", "none", "fp32", 2, ()),
    ("40m", "z1", "none", "bf16", 1, ()),
    ("40m", "z1", "cpu", "fp32", 1, ()),
    ("40m", "z2", "none", "fp32", 2, ()),
    ("40m", "z2", "cpu", "bf16", 2, ()),
    ("40m", "z3", "none", "bf16", 2, ()),
    ("40m", "z3", "cpu", "fp32", 2, ()),
    ("40m", "z3", "cpu_param", "bf16", 1, ()),
    ("40m", "z3", "nvme", "fp32", 1, ()),
    ("40m", "z3", "nvme", "bf16", 2, ()),
    ("125m", "z0", "none", "fp32", 1, ()),
    ("125m", "z1", "none", "fp32", 1, ()),
    ("125m", "z1", "none", "bf16", 2, ()),
    ("125m", "z1", "cpu", "bf16", 1, ()),
    ("125m", "z2", "none", "bf16", 2, ()),
    ("125m", "z2", "cpu", "fp32", 1, ()),
    ("125m", "z3", "none", "fp32", 2, ()),
    ("125m", "z3", "none", "bf16", 1, ()),
    ("125m", "z3", "cpu", "bf16", 1, ()),
    ("125m", "z3", "cpu_param", "fp32", 2, ()),
    ("125m", "z3", "nvme", "bf16", 1, ()),
    ("125m", "z3", "nvme_param", "bf16", 1, ()),
    ("125m", "z3", "nvme_param", "fp32", 2, ()),
]


def measure(case: tuple, folder: Path) -> dict[str, float]:
    """Run one case; returns the measured peak and the plan of a rank, in bytes."""
    model, zero, offload, precision, dp, more = case
    overrides = [
        *COMMON,
        *MODELS[model],
        f"zero={zero}",
        f"offload={offload}",
        f"precision={precision}",
        f"launch.procs_per_node={dp}",
        f"offload.nvme_path={folder / 'drive'}",
        f"run.dir={folder / 'run'}",
        "train.global_batch_size=16",
        *more,
    ]
    done = subprocess.run(
        [sys.executable, "-m", "anyshard", "train", *overrides],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise SystemExit(f"{case}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    peak = max(json.loads(line).get("mem/peak_gib", 0) for line in lines)
    plan = json.loads((folder / "run" / "plan.json").read_text())
    return {"measured": peak * GIB, "params": plan["num_params"], **plan["memory_bytes_per_rank"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of cases")
    parser.add_argument("--json", type=Path, help="where to write every figure")
    args = parser.parse_args()
    print(machine(), flush=True)
    rows, errors = [], []
    for number, case in enumerate(CASES):
        if args.only and number not in args.only:
            continue
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/var/tmp")) as folder:
            start = time.monotonic()
            found = measure(case, Path(folder))
        rows.append({"case": list(case), **found})
        predicted, measured = found.get("process_bytes", 0), found["measured"]
        errors.append(predicted / measured - 1)
        print(
            f"| {number} | {' '.join(str(each) for each in case[:5])} | {measured / GIB:.3f} | {predicted / GIB:.3f} | "
            f"{100 * errors[-1]:+.1f} % | {time.monotonic() - start:.0f} s",
            flush=True,
        )
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1))
    mean = 100 * statistics.mean(map(abs, errors))
    low = sum(error < 0 for error in errors)
    print(f"largest: {100 * max(errors, key=abs):+.1f} %; below the measured: {low} of {len(errors)}")
    repeat_with()
    return 0 if verdict("mean error", mean, 8.0, unit="%") else 1


if __name__ == "__main__":
    sys.exit(main())
