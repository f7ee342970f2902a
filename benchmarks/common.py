"""What the benchmarks share: the state of the machine, medians, lines of results, the options of the hand-written loop."""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anyshard.configs import schema

CORES = len(os.sched_getaffinity(0))


def machine() -> str:
    """One line that says how much else was running."""
    return f"{CORES} cores, load {os.getloadavg()[0]:.1f}"


def spread(values: Sequence[float]) -> str:
    """The quartiles around the median, so that a reader sees the noise."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.4g} ({low:.4g} to {high:.4g})"


def verdict(name: str, value: float, target: float, *, unit: str) -> bool:
    """Print one figure beside its target (an upper limit); returns whether it is met."""
    met = value <= target
    print(f"{name}: {value:.4g} {unit} (target <= {target:g} {unit}): {'met' if met else 'MISSED'}", flush=True)
    return met


def repeat_with() -> None:
    print(f"repeat with: {' '.join(['python', *sys.argv])}", flush=True)


def hand_written_options(config: schema.Config, ds_config: dict[str, Any], tokens: Path) -> dict[str, Any]:
    """What `hand_written.Options` takes, so that it trains the same model on the same file under the same settings."""
    model = {name: value for name, value in config.model.config.items() if name != "model_type"}
    return {
        "model": model,
        "deepspeed": ds_config,
        "tokens": str(tokens),
        "sequence_length": config.data.sequence_length,
        "max_steps": config.train.max_steps,
        "lr": config.optimizer.lr,
        "weight_decay": config.optimizer.weight_decay,
        "betas": list(config.optimizer.betas),
        "log_every_steps": config.train.log_every_steps,
        "seed": config.seed,
    }
