"""Runs `fit` on the ranks of a pool and gives back what it recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers.ranks import run_ranks

TINY = ["debug=smoke", "train.log_every_steps=1", "train.eval_samples=0", "checkpoint.every_steps=0", "checkpoint.at_end=false"]


def fit_here(overrides: list[str], run_dir: str) -> dict[str, Any]:
    """On a rank: train; returns how it ended."""
    from anyshard import compose, fit
    from anyshard.trainer.signals import Signals

    outcome = fit(compose([*TINY, f"run.dir={run_dir}", *overrides]), signals=Signals())
    return {"step": outcome.step, "stopped": outcome.stopped, "evaluation": outcome.evaluation}


def train(run_dir: Path, overrides: list[str], world_size: int, **options: Any) -> list[dict[str, Any]]:
    """Train a tiny model on `world_size` ranks; returns the records of metrics.jsonl."""
    run_ranks(fit_here, world_size, overrides=overrides, run_dir=str(run_dir), **options)
    return records(run_dir)


def records(run_dir: Path) -> list[dict[str, Any]]:
    """The records of logged steps."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "train/loss" in line]


def curve(run_dir: Path, overrides: list[str], world_size: int, metric: str = "train/loss") -> list[float]:
    """The losses (or another metric) of every step."""
    return [record[metric] for record in train(run_dir, overrides, world_size)]
