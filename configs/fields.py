"""How a configuration key is written down: a dataclass field that carries its documentation."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def key(
    default: Any,
    doc: str,
    *,
    unit: str = "",
    ge: float | None = None,
    le: float | None = None,
    gt: float | None = None,
    why: str = "",
) -> Any:
    """A configuration key: a dataclass field whose metadata holds what `config explain` and the reference print.

    Args:
        default: the value used where no YAML file or override sets the key.
        doc: what the key does, one sentence.
        unit: what the number counts or is measured in ("tokens", "s", "ranks"), empty for names, ratios and ordinals.
        ge, le, gt: bounds of a numeric value (>=, <=, >).
        why: the reason for the default, with its source; what an empty default means ("null: no limit"). A few words: it is
            a cell of a table.
    """
    metadata = {"doc": doc, "unit": unit, "ge": ge, "le": le, "gt": gt, "why": why}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)
