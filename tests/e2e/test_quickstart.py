"""`make train`: the script that it runs, shortened by overrides, and what it takes a machine for."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from helpers.cli import environment, happened, steps

pytestmark = pytest.mark.e2e

SCRIPT = Path(__file__).parents[2] / "tools" / "train.sh"
SHORT = [
    "model=tiny",
    "data.tokenizer=bytes",
    "data.sequence_length=64",
    "train.max_steps=30",
    "train.eval_every_steps=10",
    "train.eval_samples=16",
    "train.log_every_steps=5",
    "checkpoint.every_steps=10",
    "schedule.warmup_steps=5",
    "stop.at_step=24",
]


def script(*overrides: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPT), *overrides]
    return subprocess.run(command, cwd=cwd, env=environment(**env), capture_output=True, text=True, timeout=500, check=False)


@pytest.mark.slow
def test_it_trains_stops_resumes_and_shows_what_came_out(tmp_path: Path) -> None:
    done = script(*SHORT, f"data.cache_dir={tmp_path}/cache", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    head, *parts = re.split(r"^== \d/4 +", done.stdout, flags=re.MULTILINE)
    assert head.strip() == ""
    train, resume, checkpoints, result = parts

    (run,) = (tmp_path / "runs").iterdir()
    assert "stopping after step 24: stop.at_step=24" in train
    assert "at step 24 (saved under" in resume
    assert "now dp 1, ZeRO 3)" in resume
    assert [event["zero"] for event in happened(run, "start")] == [1, 3]
    assert len(happened(run, "stop")) == len(happened(run, "done")) == 1
    assert steps(run)[-1]["step"] == 30
    assert steps(run)[-1]["train/loss"] < steps(run)[0]["train/loss"]

    listed = {int(step) for step in re.findall(r"^\W*(\d+)\b.*complete", checkpoints, re.MULTILINE)}
    assert listed == {int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*")}
    assert listed >= {24, 30}
    assert "every byte is as it was written" in checkpoints

    found = re.search(r"^validation perplexity +([\d.]+) +\(a unigram model has ([\d.]+)\)$", result, re.MULTILINE)
    assert found
    assert 1 < float(found[1]) < 256
    plot = re.search(r"^plot +(\S+)$", result, re.MULTILINE)
    assert plot
    assert (tmp_path / plot[1]).read_bytes()[:4] == b"\x89PNG"
    assert f"anyshard resume runs/{run.name} " in result


def test_a_failed_training_ends_it_with_its_code(tmp_path: Path) -> None:
    done = script("train.max_stepss=1", cwd=tmp_path)
    assert done.returncode == 2
    assert "Did you mean train.max_steps" in done.stderr
    assert "2/4" not in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("listing", "code", "one_rank", "gpu"),
    [
        ("GPU 0: NVIDIA H200 (UUID: GPU-1)", 0, True, True),
        ("GPU 0: NVIDIA H200 (UUID: GPU-1)\nGPU 1: NVIDIA H200 (UUID: GPU-2)", 0, False, True),
        ("No devices found.", 0, False, False),
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", 9, False, False),
    ],
)
def test_only_a_gpu_that_is_listed_counts(listing: str, code: int, one_rank: bool, gpu: bool, tmp_path: Path) -> None:
    """Both commands that the script asks are written anew here: one tells of a machine, the other what it was asked for."""
    programs = {"nvidia-smi": f"cat <<'END'\n{listing}\nEND\nexit {code}", "anyshard": 'echo "$@" > asked; exit 7'}
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    done = script("seed=3", cwd=tmp_path, PATH=f"{tmp_path}:{environment()['PATH']}")
    assert done.returncode == 7, done.stderr
    asked = (tmp_path / "asked").read_text().split()
    assert ("launch.procs_per_node=1" in asked) == one_rank
    has_bf16 = re.search(r"\b(amx_bf16|avx512_bf16)\b", Path("/proc/cpuinfo").read_text()) is not None
    assert ("precision=bf16" in asked) == (gpu or has_bf16)
    assert asked[-1] == "seed=3"  # after what the script chose, so that it wins
