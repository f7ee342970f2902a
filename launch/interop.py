"""What `anyshard ckpt export|import|convert|diff` print; the work is done by a child process, which has torch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from rich.table import Table

from anyshard.configs.errors import EXIT_DONE, EXIT_FAILED, ConfigError, Problem
from anyshard.launch.child import call
from anyshard.launch.console import make_console
from anyshard.trainer.checkpoint.interop.output import refuse_occupied

FORMATS = ("hf", "universal", "dcp")
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
SHOWN = 40  # differences that are printed
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def export(
    source: Path, out: Path, *, to: str, dtype: str | None, max_shard_size: str, config: Path | None, as_json: bool
) -> int:
    """Write a checkpoint in another format; returns 0.

    Raises:
        ConfigError: an option is wrong, `out` is occupied, or the format cannot hold this checkpoint.
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    if to not in FORMATS:
        raise ConfigError(Problem("--to", to, "there is no such format.", f"Choose one of {', '.join(FORMATS)}."))
    if dtype is not None and (to != "hf" or dtype not in DTYPES):
        reason = "there is no such type to export in." if to == "hf" else f"--to {to} keeps every state as it is stored."
        raise ConfigError(Problem("--dtype", dtype, reason, "Choose bf16, fp16 or fp32 with --to hf, or leave it out."))
    request = {
        "command": "export",
        "source": str(source),
        "out": str(out),
        "to": to,
        "dtype": DTYPES[dtype] if dtype else None,
        "max_shard_bytes": size_bytes(max_shard_size),
        "config": str(config) if config else None,
    }
    refuse_occupied(out)
    return _told(call(f"exporting {source}", request, show_progress=not as_json), as_json=as_json)


def import_(source: Path, out: Path, *, weights_only: bool, config: Path | None, as_json: bool) -> int:
    """Read a checkpoint of another format into ours; returns 0.

    Raises:
        ConfigError: an option is wrong, or `out` is occupied.
        CheckpointError: there is nothing that can be imported, or it is damaged.
    """
    refuse_occupied(out)
    request = {
        "command": "import",
        "source": str(source),
        "out": str(out),
        "weights_only": weights_only,
        "config": str(config) if config else None,
    }
    result = call(f"importing {source}", request, show_progress=not as_json)
    if not as_json:
        result["notes"].append(f"continue from it: anyshard train ... resume={out}")
    return _told(result, as_json=as_json)


def convert(source: Path, out: Path, *, num_files: int | None, as_json: bool) -> int:
    """Rewrite a checkpoint in the present version of the format; returns 0.

    Raises:
        ConfigError: `out` is occupied, or has the name of another step.
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    refuse_occupied(out)
    request = {"command": "convert", "source": str(source), "out": str(out), "num_files": num_files}
    return _told(call(f"converting {source}", request, show_progress=not as_json), as_json=as_json)


def diff(a: Path, b: Path, *, weights_only: bool, as_json: bool) -> int:
    """Compare two checkpoints; returns 0 when they hold the same, 1 when not.

    Raises:
        CheckpointError: one of them is not there, or damaged.
    """
    request = {"command": "diff", "a": str(a), "b": str(b), "weights_only": weights_only}
    result = call(f"comparing {a} and {b}", request, show_progress=not as_json)
    differences = result["differences"]
    if as_json:
        print(json.dumps(result))
        return EXIT_FAILED if differences else EXIT_DONE
    console = make_console()
    console.print(f"a: {result['a']}\nb: {result['b']}", highlight=False, soft_wrap=True, markup=False)
    if differences:
        table = Table("tensor", "state", "differs in", "a", "b", "max |a-b|", "max relative", "elements")
        for row in differences[:SHOWN]:
            numbers = [f"{row[key]:.3g}" if key in row else "" for key in ("max_abs", "max_rel")]
            count = f"{row['num_different']:,}" if "num_different" in row else ""
            table.add_row(row["name"], row["key"], row["what"], _text(row.get("a")), _text(row.get("b")), *numbers, count)
        console.print(table)
        if len(differences) > SHOWN:
            console.print(f"and {len(differences) - SHOWN} more (--json prints all)", highlight=False)
    same = "the same" if not differences else f"{len(differences)} differences"
    console.print(f"{same}: {result['num_equal']} of {result['num_tensors']} tensors are equal bit for bit", highlight=False)
    return EXIT_FAILED if differences else EXIT_DONE


def size_bytes(text: str) -> int:
    """The number of bytes in "5GB", "200MiB" or "1000000".

    Raises:
        ConfigError: it is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?I?)B?", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if size < 1:
        raise ConfigError(Problem("--max-shard-size", text, "it is not a size.", "Write it as 5GB or 500MiB."))
    return size


def _told(result: dict[str, Any], *, as_json: bool) -> int:
    """Print what was written."""
    if as_json:
        print(json.dumps(result))
        return EXIT_DONE
    console = make_console()
    facts = ", ".join(f"{key} {_text(value)}" for key, value in result.items() if key not in ("out", "notes", "files"))
    files = f", {len(result['files'])} files of tensors" if "files" in result else ""
    console.print(f"{result['out']}: {facts}{files}", highlight=False, soft_wrap=True, markup=False)
    for note in result.get("notes", ()):
        console.print(f"  note: {note}", highlight=False, soft_wrap=True, markup=False)
    return EXIT_DONE


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)
