"""What a key does, what it may hold, what it holds now and which file or override says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from anyshard.configs.compose import Composition
from anyshard.configs.errors import ConfigError
from anyshard.configs.keys import Key, all_keys, find, flatten
from anyshard.configs.schema import GROUPS
from anyshard.configs.structure import unknown_key

DEFAULT_SOURCE = "the default"


@dataclass(frozen=True)
class Explanation:
    """A key, its value in a composed configuration, and what set it."""

    path: str
    key: Key
    value: Any
    source: str


def explain(path: str, composition: Composition) -> list[Explanation]:
    """Explain a key, every key of a group, or what lies below an open mapping (`model.config`).

    Raises:
        ConfigError: there is no such key.
    """
    values = flatten(composition.config)
    key = find(path)
    if path in GROUPS:
        paths = [name for name in all_keys() if name.startswith(f"{path}.")]
    elif key is None or (path != key.path and path not in values):
        raise ConfigError(unknown_key(path, None))
    elif key.is_open and path == key.path:
        paths = [name for name in values if name == path or name.startswith(f"{path}.")] or [path]
    else:
        paths = [path]
    return [_explain(name, values, composition) for name in paths]


def _explain(path: str, values: dict[str, Any], composition: Composition) -> Explanation:
    key = find(path)
    assert key is not None, path
    value = values.get(path, key.default)
    return Explanation(path, key, value, source_of(path, composition.sources))


def source_of(path: str, sources: dict[str, str]) -> str:
    """The file or override that set a key: the entry for the key itself, else an override of a mapping that holds it."""
    if path in sources:
        return sources[path]
    parent = path.rpartition(".")[0]
    while parent:
        if "{" in sources.get(parent, ""):  # override deepspeed_extra={...}
            return sources[parent]
        parent = parent.rpartition(".")[0]
    return DEFAULT_SOURCE
