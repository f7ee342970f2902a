"""Statements about the installed DeepSpeed that code of ours depends on, and what to remove once they are false."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any


def line(where: str) -> str:
    """The line of a source file below the package `deepspeed`, given as "runtime/constants.py:203"."""
    import deepspeed

    name, _, number = where.partition(":")
    lines = (Path(deepspeed.__file__).parent / name).read_text().splitlines()
    return lines[int(number) - 1] if int(number) <= len(lines) else ""


def still(holds: bool, where: str, text: str, workaround: str) -> None:
    """Fail unless upstream still behaves so and the line that makes it do so is where our comments say.

    Args:
        holds: what was observed.
        where: "file:line" below the package, which contains `text`.
        workaround: our file, and what in it to remove or to look at again.
    """
    assert holds, f"upstream changed (deepspeed {version('deepspeed')}, {where}): remove our workaround in {workaround}"
    found = line(where)
    assert text in found, (
        f"upstream changed (deepspeed {version('deepspeed')}): {where} is now {found.strip()!r} and not {text!r}; "
        f"look again at {workaround} and correct the line numbers"
    )


def ds_config(**keys: Any) -> Any:
    """DeepSpeed's parsed configuration for one rank: a batch of 4, and `keys`."""
    from deepspeed.runtime.config import DeepSpeedConfig

    return DeepSpeedConfig({"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1, **keys})
