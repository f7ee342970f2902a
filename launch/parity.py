"""`anyshard parity A B`: the same run under two layouts, and how far apart they are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.table import Table

from anyshard.configs.compose import compose
from anyshard.configs.errors import EXIT_DONE, EXIT_FAILED, ConfigError, Problem
from anyshard.launch import train
from anyshard.launch.child import call
from anyshard.launch.console import make_console
from anyshard.trainer.callbacks.curves import plot, read_metrics
from anyshard.trainer.checkpoint.catalog import list_checkpoints
from anyshard.trainer.checkpoint.interop.output import refuse_occupied

TOLERANCES = {"fp32": 1e-5, "bf16": 3e-2, "fp16": 3e-2}
"""Relative, of losses: the noise of the order of sums, and of 8 to 11 bits of mantissa."""
NORM_FACTOR = 10
"""Gradient norms may differ by so many times the tolerance of losses."""


def overrides_of(layout: str) -> list[str]:
    """The overrides of a layout such as dp2, tp2 or dp2xtp2xz3.

    Raises:
        ConfigError: it is none.
    """
    found: dict[str, int] = {}
    for part in layout.split("x"):
        match = re.fullmatch(r"(dp|tp|pp|sp|z)(\d+)", part)
        if match is None or match[1] in found or (match[1] != "z" and not int(match[2])):
            fix = "Give degrees of dp, tp, pp and sp and a stage of ZeRO, such as dp2, tp2 or dp2xtp2xz3."
            raise ConfigError(Problem("LAYOUT", layout, f"{part!r} is no degree and no stage, or is there twice.", fix))
        found[match[1]] = int(match[2])
    ranks = 1
    result = [f"zero=z{found.pop('z')}"] if "z" in found else []
    for axis in ("dp", "tp", "pp", "sp"):
        degree = found.get(axis, 1)
        ranks *= degree
        result.append(f"parallel.{axis}={degree}")
    return [*result, f"launch.procs_per_node={ranks}", "launch.nodes=1"]


def run(a: str, b: str, overrides: Sequence[str], *, out: Path, steps: int, tolerance: float | None) -> int:
    """Train under both layouts and compare; returns 0 when they agree, 1 when not.

    Args:
        out: folder of the two runs, which must not exist.
        tolerance: relative, of the losses; None: by precision.

    Raises:
        ConfigError: a layout or an override cannot be used.
    """
    refuse_occupied(out)
    runs = {out / "a": a, out / "b": b}
    for run_dir, layout in runs.items():
        fixed = [f"train.max_steps={steps}", "train.log_every_steps=1", "train.eval_samples=0", f"run.dir={run_dir.absolute()}"]
        fixed += ["launch=local", "checkpoint.every_steps=0", "checkpoint.at_end=true", "resume=never"]
        config = compose([*(overrides or ["debug=smoke"]), *overrides_of(layout), *fixed])
        code = train.start(config, [], dry_run=False)
        if code != EXIT_DONE:
            return code
        tolerance = TOLERANCES[config.precision.dtype.value] if tolerance is None else tolerance
    assert tolerance is not None
    left, right = ([record for record in read_metrics(run_dir) if "train/loss" in record] for run_dir in runs)
    newest = [str(list_checkpoints(run_dir / "checkpoints")[0].path) for run_dir in runs]
    request = {"command": "diff", "a": newest[0], "b": newest[1], "weights_only": True}
    parameters = call("comparing the parameters", request, show_progress=False)
    agreed = agree(left, right, tolerance)
    show(a, b, left, right, parameters)
    if find_spec("matplotlib"):
        print(f"curves: {plot(list(runs), out / 'parity.png')}")
    verdict = "agree" if agreed else "do NOT agree"
    print(
        f"{a} and {b} {verdict} over {len(left)} steps (losses within {tolerance:g}, norms within {NORM_FACTOR * tolerance:g})"
    )
    return EXIT_DONE if agreed else EXIT_FAILED


def relative(left: dict[str, Any], right: dict[str, Any], name: str) -> float:
    """|a - b| / |b| of a metric of two records; infinite where only one has it."""
    a, b = left.get(name), right.get(name)
    if a is None or b is None:
        return 0.0 if a is b else float("inf")
    return float(abs(a - b) / max(abs(b), 1e-30))


def agree(left: list[dict[str, Any]], right: list[dict[str, Any]], tolerance: float) -> bool:
    """Whether two runs have the same steps, and losses and gradient norms within the tolerance at each."""
    if not left or [record["step"] for record in left] != [record["step"] for record in right]:
        return False
    limits = {"train/loss": tolerance, "train/grad_norm": NORM_FACTOR * tolerance}
    pairs = list(zip(left, right, strict=True))
    return all(relative(x, y, name) <= limit for x, y in pairs for name, limit in limits.items())


def show(a: str, b: str, left: list[dict[str, Any]], right: list[dict[str, Any]], parameters: dict[str, Any]) -> None:
    """Print both curves side by side, and the parameters that are furthest apart."""
    console = make_console()
    table = Table("step", f"loss {a}", f"loss {b}", "relative", f"norm {a}", f"norm {b}", "relative")
    for x, y in zip(left, right, strict=False):
        cells = [str(x["step"])]
        for name in ("train/loss", "train/grad_norm"):
            values = [f"{record[name]:.6f}" if record.get(name) is not None else "" for record in (x, y)]
            cells += [*values, f"{relative(x, y, name):.1e}"]
        table.add_row(*cells)
    console.print(table)
    furthest = sorted(parameters["differences"], key=lambda row: -row.get("max_abs", float("inf")))[:5]
    equal, count = parameters["num_equal"], parameters["num_tensors"]
    console.print(f"parameters: {equal} of {count} are equal bit for bit; the furthest apart:", highlight=False)
    for row in furthest:
        console.print(f"  {row['name']}: max |a-b| {row.get('max_abs', float('inf')):.2e}", highlight=False, markup=False)
