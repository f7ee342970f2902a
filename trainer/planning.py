"""plan.json for ranks that no launcher has planned: written by the planner itself, in a process beside data and model."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import torch

from anyshard.configs import schema
from anyshard.configs.frozen import CONFIG_FILE
from anyshard.configs.registry import lookup
from anyshard.trainer.flops import flops_per_token
from anyshard.trainer.models.table import table_of

logger = logging.getLogger(__name__)

TIMEOUT_S = 120.0


def start_planning(run_dir: Path) -> subprocess.Popen[bytes] | None:
    """Plan the frozen configuration of a run; None where its plan is there. Rank 0 calls it."""
    planned = run_dir / "plan.json"
    if planned.exists() and planned.stat().st_mtime >= (run_dir / CONFIG_FILE).stat().st_mtime:
        return None
    planned.unlink(missing_ok=True)  # of another configuration
    command = [sys.executable, "-m", "anyshard.launch.plan", str(run_dir)]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environ)


def planned_flops_per_token(run_dir: Path, planning: subprocess.Popen[bytes] | None) -> float | None:
    """Work of one token, as planned; None where planning failed, which the log says.

    Args:
        planning: what `start_planning` gave.
    """
    try:
        if planning is not None:
            planning.wait(timeout=TIMEOUT_S)
        return float(json.loads((run_dir / "plan.json").read_text())["flops_per_token"])
    except (OSError, ValueError, KeyError, subprocess.TimeoutExpired) as error:
        logger.warning("there is no plan, and so no perf/mfu_pct: %s", error)
        return None


def counted_flops_per_token(config: schema.Config) -> float:
    """Work of one token, counted here: in a process whose own models no other process knows."""
    build = lookup("model", config.model.builder, key="model.builder")
    model = build(config, device=torch.device("meta"), dtype=torch.float32, partition=None, say=lambda line: None)
    return flops_per_token(table_of(model), config.data.sequence_length, recompute=config.train.activation_checkpointing)
