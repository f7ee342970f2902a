"""From plain YAML data to the dataclasses of the schema, with every type error and unknown key reported together.

Composed and frozen configurations both pass through here, so that they are checked alike. Values are checked for their
type only; ranges and what crosses groups are in `rules.py`.
"""

from __future__ import annotations

import dataclasses
import difflib
from enum import Enum
from typing import Any, get_args, get_origin, get_type_hints

from anyshard.configs.errors import ConfigError, Problem
from anyshard.configs.keys import alternatives, describe, nearest
from anyshard.configs.schema import Config


class _Mismatch(Exception):
    """A value is not of the wanted type; the argument is the path below the key, if any."""


def structure(data: dict[str, Any]) -> tuple[Config, list[Problem]]:
    """The configuration that the data describes, and everything wrong with it; keys that are wrong keep their defaults."""
    problems: list[Problem] = []
    config = _dataclass(Config, data, "", problems)
    assert isinstance(config, Config)
    return config, problems


def structure_or_raise(data: dict[str, Any]) -> Config:
    """The configuration that the data describes.

    Raises:
        ConfigError: a key is unknown or has the wrong type; names all of them.
    """
    config, problems = structure(data)
    if problems:
        raise ConfigError(problems)
    return config


def unknown_key(path: str, value: object) -> Problem:
    """The problem that says there is no such key, with the nearest that exists."""
    near = nearest(path)
    hint = f"Did you mean {near}? " if near else ""
    return Problem(path, value, "there is no such key.", f"{hint}'anyshard config explain' lists all keys.")


def _dataclass(cls: type, data: dict[str, Any], prefix: str, problems: list[Problem]) -> Any:
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for name, item in data.items():
        path = f"{prefix}{name}"
        if name not in hints:
            problems.append(unknown_key(path, item))
        elif dataclasses.is_dataclass(hints[name]):
            if isinstance(item, dict):
                values[name] = _dataclass(hints[name], item, f"{path}.", problems)
            else:
                problems.append(_not_a_group(path, item))
        else:
            try:
                values[name] = convert(hints[name], item)
            except _Mismatch:
                problems.append(_wrong_type(path, item, hints[name]))
    return cls(**values)


def _not_a_group(path: str, value: object) -> Problem:
    fix = (
        f"Set its keys ({path}.KEY=...); a YAML file chooses one of its files by 'override /{path}: ...' in its defaults list."
    )
    return Problem(path, value, "this is a group of keys.", fix)


def _wrong_type(path: str, value: object, kind: Any) -> Problem:
    members = alternatives(kind)
    enum = next((member for member in members if isinstance(member, type) and issubclass(member, Enum)), None)
    if enum is not None:
        near = difflib.get_close_matches(str(value), [member.value for member in enum], n=1)
        fix = f"Did you mean {near[0]}? " if near else ""
        return Problem(path, value, "there is no such choice.", f"{fix}There are: {', '.join(m.value for m in enum)}.")
    return Problem(path, value, f"it is {_kind_of(value)}.", f"Give: {describe(kind)}.")


def _kind_of(value: object) -> str:
    words = {str: "a string", bool: "a truth value", int: "an integer", float: "a number", dict: "a mapping", list: "a list"}
    return words.get(type(value), "null" if value is None else f"a {type(value).__name__}")


def convert(kind: Any, value: Any) -> Any:
    """The value as the given type of the schema.

    A whole float is taken for an integer (`1e6`) and a number for a string (`run.name=7`), as people write them.
    """
    members = alternatives(kind)
    if len(members) > 1:
        return _convert_union(members, value)
    if get_origin(kind) is dict:
        return _convert_mapping(get_args(kind)[1], value)
    if get_origin(kind) is list:
        if not isinstance(value, list):
            raise _Mismatch
        return [convert(get_args(kind)[0], item) for item in value]
    if isinstance(kind, type) and issubclass(kind, Enum):
        if value in [member.value for member in kind]:
            return kind(value)
        raise _Mismatch
    return _convert_scalar(kind, value)


def _convert_union(members: tuple[Any, ...], value: Any) -> Any:
    if type(value) in members:
        whole = int in members and isinstance(value, float) and value.is_integer() and value > 1
        return int(value) if whole else value
    for member in members:
        try:
            return convert(member, value)
        except _Mismatch:
            continue
    raise _Mismatch


def _convert_mapping(kind: Any, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Mismatch
    return {str(name): item if kind is Any else convert(kind, item) for name, item in value.items()}


def _convert_scalar(kind: Any, value: Any) -> Any:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is type(None) and value is None:
        return None
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and is_number and float(value).is_integer():
        return int(value)
    if kind is float and is_number:
        return float(value)
    if kind is str and (isinstance(value, str) or is_number):
        return str(value)
    raise _Mismatch
