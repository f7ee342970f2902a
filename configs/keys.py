"""The table of all configuration keys, read from the schema; flattening to keys; the nearest key to a misspelt one.

Everything that lists, checks or explains keys works on this table. Pure, without Hydra.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from anyshard.configs.schema import GROUPS, Config


@dataclass(frozen=True)
class Key:
    """One configuration key: its dotted path, resolved type, default as YAML data, and the schema's metadata."""

    path: str
    type: Any
    default: Any
    doc: str
    unit: str
    ge: float | None
    le: float | None
    gt: float | None
    why: str

    @property
    def group(self) -> str:
        """The configuration group, empty for a key of the root."""
        return self.path.partition(".")[0] if "." in self.path else ""

    @property
    def is_open(self) -> bool:
        """Whether anything may be set below this key (a mapping)."""
        return get_origin(self.type) is dict

    @property
    def type_text(self) -> str:
        """The type in words: "integer", "sync | async", "integer | auto"."""
        return describe(self.type)

    @property
    def range_text(self) -> str:
        """The range in symbols, such as "> 0, <= 1"; empty when there is none."""
        bounds = ((">=", self.ge), (">", self.gt), ("<=", self.le))
        return ", ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)


_WORDS: dict[Any, str] = {str: "string", int: "integer", float: "number", bool: "true | false", type(None): "null", Any: "any"}


def alternatives(kind: Any) -> tuple[Any, ...]:
    """The members of a Union or Optional; a tuple of the type itself otherwise."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def describe(kind: Any) -> str:
    """A type of the schema in words."""
    members = alternatives(kind)
    if members == (int, str):  # the schema's way to write "a number or auto"
        return "integer | auto"
    if len(members) > 1:
        return " | ".join(describe(member) for member in members)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return " | ".join(member.value for member in kind)
    if get_origin(kind) is list:
        return f"list of {describe(get_args(kind)[0])}s"
    if get_origin(kind) is dict:
        return "mapping"
    return _WORDS[kind]


def plain(value: Any) -> Any:
    """A dataclass, enum or container as plain YAML and JSON data."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


@lru_cache(maxsize=1)
def all_keys() -> dict[str, Key]:
    """Every key of the schema by its dotted path, in the schema's order."""
    defaults = plain(Config())
    keys: dict[str, Key] = {}

    def add(cls: type, prefix: str, values: dict[str, Any]) -> None:
        hints = get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if dataclasses.is_dataclass(hints[field.name]):
                add(hints[field.name], f"{prefix}{field.name}.", values[field.name])
                continue
            path = prefix + field.name
            keys[path] = Key(path, hints[field.name], values[field.name], **field.metadata)

    add(Config, "", defaults)
    return keys


def find(path: str) -> Key | None:
    """The key that `path` names, or the open mapping that it lies in."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        key = all_keys().get(".".join(parts[:length]))
        if key is not None:
            return key if length == len(parts) or key.is_open else None
    return None


def flatten(config: Config) -> dict[str, Any]:
    """Every key with its value as YAML data; an open mapping is flattened to its leaves, and an empty one left out."""
    data = plain(config)
    flat: dict[str, Any] = {}
    for path, key in all_keys().items():
        value: Any = data
        for part in path.split("."):
            value = value[part]
        if not key.is_open:
            flat[path] = value
        elif value:
            flat.update(leaves(value, path))
    return flat


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """The leaves of nested mappings by dotted path; an empty mapping is a leaf."""
    if not isinstance(value, dict) or not value:
        return {path: value} if path else {}
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat.update(leaves(item, f"{path}.{name}" if path else str(name)))
    return flat


def nearest(path: str) -> str | None:
    """The key or group most likely meant by a misspelt one: the same last name elsewhere, else the closest spelling."""
    known = [*all_keys(), *GROUPS]
    group, _, name = path.rpartition(".")
    same_name = [key for key in known if key.rpartition(".")[2] == name]
    if same_name:
        return max(same_name, key=lambda key: difflib.SequenceMatcher(None, key, path).ratio())
    in_group = {key.rpartition(".")[2]: key for key in all_keys() if key.rpartition(".")[0] == group}
    close = difflib.get_close_matches(name, in_group, n=1)
    if close:
        return in_group[close[0]]
    close = difflib.get_close_matches(path, known, n=1)
    return close[0] if close else None
