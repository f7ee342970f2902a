"""A model that is large enough to be swapped to a drive, yet trains in seconds."""

from __future__ import annotations

from pathlib import Path

LARGE_ENOUGH = [
    "model.config.hidden_size=256",
    "model.config.intermediate_size=2048",
    "model.config.num_hidden_layers=2",
    "data.sequence_length=16",
    "train.max_steps=20",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    "train.max_grad_norm=0.8",
    "optimizer.weight_decay=0.1",
    "offload.buffers_gib=0.1",
]
"""Matrices of 2 MiB in fp32: of 1 MiB, which is the least that is swapped, on each of two ranks."""


def on_drive(offload: str, drive: Path, *more: str) -> list[str]:
    """Overrides of a tier."""
    return [*LARGE_ENOUGH, "zero=z3", f"offload={offload}", f"offload.nvme_path={drive}", *more]
