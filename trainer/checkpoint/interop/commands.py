"""The commands of `__main__.py` by name: from paths and options to a source and what becomes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from anyshard.trainer.checkpoint import catalog
from anyshard.trainer.checkpoint.interop.diff import diff
from anyshard.trainer.checkpoint.interop.hf_export import export_hf
from anyshard.trainer.checkpoint.interop.source import Source, Stored

Report = Callable[[int, int], None]


def _open(path: str) -> Source:
    return Stored(catalog.resolve(Path(path)))


def _export(
    source: str, out: str, to: str, dtype: str | None, max_shard_bytes: int, config: str | None, report: Report
) -> dict[str, Any]:
    stored = Stored(catalog.resolve(Path(source)))
    return export_hf(
        stored,
        Path(out),
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        config_file=Path(config) if config else None,
        report=report,
    )


def _diff(a: str, b: str, weights_only: bool, report: Report) -> dict[str, Any]:
    return diff(_open(a), _open(b), weights_only=weights_only, report=report)


COMMANDS: dict[str, Callable[..., dict[str, Any]]] = {"export": _export, "diff": _diff}
"""Name -> function of the request's other keys and `report`; returns JSON."""
