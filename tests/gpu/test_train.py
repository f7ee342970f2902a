"""Training on one GPU: every ZeRO stage and precision, CPU offload, and a resume on another layout."""

from __future__ import annotations

import math

import pytest
from helpers.cli import SMOKE, anyshard, happened, steps

ON_GPU = {"CUDA_VISIBLE_DEVICES": "0", "DS_ACCELERATOR": "cuda"}
ONE = [*SMOKE[:-1], "launch.procs_per_node=1", "run.dir=run", "train.log_every_steps=1"]

CELLS = [
    ["zero=z0", "precision=fp32"],
    ["zero=z1", "precision=bf16"],
    ["zero=z2", "precision=fp16"],
    ["zero=z3", "precision=bf16"],
    ["zero=z1", "precision=bf16", "offload=cpu"],
    ["zero=z3", "precision=bf16", "offload=cpu_param"],
]


@pytest.mark.parametrize("cell", CELLS, ids=" ".join)
def test_a_cell_trains_saves_and_resumes_on_another_stage(tmp_path, cell):
    first = anyshard("train", *ONE, *cell, "stop.at_step=10", cwd=tmp_path, timeout_s=400, env=ON_GPU)
    assert first.returncode == 75, first.stderr
    assert "1 x NVIDIA" in first.stdout
    losses = [record["train/loss"] for record in steps(tmp_path / "run")]
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]
    other = "zero=z1" if "zero=z3" in cell else "zero=z3"
    second = anyshard("resume", "run", other, "offload=none", cwd=tmp_path, timeout_s=400, env=ON_GPU)
    assert second.returncode == 0, second.stderr
    assert happened(tmp_path / "run", "restore")[0]["step"] == 10
    assert steps(tmp_path / "run")[-1]["train/loss"] < losses[0]
