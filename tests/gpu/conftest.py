"""Tests that need an NVIDIA GPU: skipped, with the reason, where there is none.

They start processes of their own with `gpu_env`, since the session's own tests run on the CPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest


def _no_gpu() -> str | None:
    """Why these tests cannot run here, or None."""
    if shutil.which("nvidia-smi") is None:
        return "no NVIDIA driver on this machine"
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    if listed.returncode or not listed.stdout.strip():
        return f"nvidia-smi finds no GPU: {(listed.stdout + listed.stderr).strip()}"
    import torch

    return None if torch.cuda.is_available() else f"this build of torch ({torch.__version__}) sees no GPU"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if "tests/gpu" in item.path.as_posix()]
    reason = _no_gpu() if here else None
    for item in here:
        item.add_marker(pytest.mark.gpu)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def gpu_env() -> dict[str, str]:
    """Environment of a process that uses the GPUs: without what makes DeepSpeed take the CPU."""
    return {key: value for key, value in os.environ.items() if key not in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES")}
