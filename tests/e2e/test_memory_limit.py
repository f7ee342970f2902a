"""A model whose state does not fit a control group's memory trains from a drive, is killed and goes on; without, it is told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.cli import environment

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

SIZES = {
    # 40 M parameters, state of 0.8 GiB in fp32
    "40m": (1100, ["model=llama_15m", "model.config.num_hidden_layers=12", "precision=fp32", "offload.buffers_gib=0.15"]),
    # 350 M parameters, state of 5.6 GB
    "350m": (3000, ["model=llama_350m", "precision=bf16", "offload.buffers_gib=0.5", "zero.reduce_bucket_size=5000000"]),
}
RUN = [
    "data=synthetic",
    "data.sequence_length=64",
    "train.micro_batch_size=1",
    "train.global_batch_size=2",
    "train.max_steps=4",
    "train.log_every_steps=1",
    "train.eval_samples=0",
    "checkpoint.every_steps=2",
    "checkpoint.staging_gib=0.07",
    "run.dir=run",
    "zero=z3",
]


@pytest.fixture
def group(request):
    """A control group of version 1 below this process's own, with a limit."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    mine = [line.split(":", 2)[2] for line in lines if line.split(":")[1] == "memory"]
    if not mine:
        pytest.skip("no control groups of version 1 here")
    folder = Path("/sys/fs/cgroup/memory", mine[0].lstrip("/"), f"anyshard-{os.getpid()}")
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"a control group cannot be made: {error.strerror}")
    yield folder
    folder.rmdir()


def _inside(group: Path, limit_mib: int, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (group / "memory.limit_in_bytes").write_text(str(limit_mib * 2**20))
    script = f'echo $$ > {group}/cgroup.procs && exec {sys.executable} -m anyshard "$@"'
    command = ["bash", "-c", script, "bash", *arguments]
    env = environment(OMP_NUM_THREADS="1")
    return subprocess.run(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("size", SIZES)
def test_a_model_that_does_not_fit_trains_from_a_drive(tmp_path, group, size):
    limit, model = SIZES[size]
    refused = _inside(group, limit, tmp_path, "train", *RUN, *model)
    assert refused.returncode == 2, refused.stderr
    assert "the kernel would kill them" in refused.stderr
    assert "offload=nvme" in refused.stderr
    swapped = [*model, "offload=nvme_param", f"offload.nvme_path={tmp_path / 'drive'}"]
    stopped = _inside(group, limit, tmp_path, "train", *RUN, *swapped, "stop.at_step=3")
    assert stopped.returncode == 75, stopped.stdout + stopped.stderr
    done = _inside(group, limit, tmp_path, "resume", "run", "stop.at_step=null")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed from" in done.stdout
    assert int((group / "memory.max_usage_in_bytes").read_text()) <= limit * 2**20
