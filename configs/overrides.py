"""Command-line overrides: read with Hydra's own grammar, then checked all together against the schema and the groups' files.

Hydra stops at the first wrong override and suggests nothing; here each wrong one becomes a problem, and the right ones
go on to Hydra in a form that it accepts everywhere (`++key=value`, so that nobody needs to know when `+` is wanted).
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException

from anyshard.configs.errors import ConfigError, Problem
from anyshard.configs.keys import all_keys, alternatives, find
from anyshard.configs.schema import GROUPS
from anyshard.configs.structure import unknown_key

SEARCHPATH = "hydra.searchpath"
Choices = dict[str, list[str]]
"""The files of each configuration group: {"zero": ["z0", "z1", ...]}."""


def split_searchpath(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take `hydra.searchpath=[...]` out of the overrides: (the other overrides, its entries).

    Raises:
        ConfigError: it is not a list of strings.
    """
    rest: list[str] = []
    entries: list[str] = []
    for text in overrides:
        if text.lstrip("+").partition("=")[0] != SEARCHPATH:
            rest.append(text)
            continue
        override, problem = _parse(text)
        value = override.value() if override else None
        if problem or not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            fix = f"Write {SEARCHPATH}=[file:///folder,pkg://package.configs]."
            raise ConfigError(Problem(SEARCHPATH, text.partition("=")[2], "it is not a list of places.", fix))
        entries += value
    return rest, entries


def check_overrides(overrides: Sequence[str], choices: Choices) -> tuple[list[str], list[Problem]]:
    """The overrides that are right, as Hydra should get them, and a problem for each of the others."""
    good: list[str] = []
    problems: list[Problem] = []
    for text in overrides:
        override, problem = _parse(text)
        if override is not None:
            problem = _check(override, choices)
        if problem is not None:
            problems.append(problem)
        elif override is not None and not _chooses_nothing(override, choices):
            good.append(_for_hydra(override, choices))
    return good, problems


def expand_sweep(overrides: Sequence[str], choices: Choices) -> list[list[str]]:
    """The overrides of every job of a sweep: all combinations of `a=1,2`, `range(...)`, `choice(...)`, `glob(...)`.

    Raises:
        ConfigError: an override cannot be read.
    """
    axes: list[list[str]] = []
    problems: list[Problem] = []
    for text in overrides:
        override, problem = _parse(text)
        if override is None:
            problems += [problem] if problem else []
        elif not override.is_sweep_override():
            axes.append([_line(override)])
        else:
            key = override.get_key_element()
            value = override.value()
            values = value.filter(choices.get(key, [])) if isinstance(value, Glob) else override.sweep_string_iterator()
            axes.append([f"{key}={item}" for item in values])
    if problems:
        raise ConfigError(problems)
    return [list(job) for job in itertools.product(*axes)]


def _parse(text: str) -> tuple[Override | None, Problem | None]:
    key, _, value = text.partition("=")
    parser = OverridesParser.create()
    try:
        return parser.parse_override(text), None
    except HydraException as error:
        reason = str(error).splitlines()[0]
    known = all_keys().get(key.lstrip("+"))
    if known and str in alternatives(known.type) and "'" not in value:
        return parser.parse_override(f"{key}='{value}'"), None  # a path such as ~/data or a=b, which needs no quotes of ours
    if "=" not in text:
        return None, Problem(text, None, "this is not an override.", "Write KEY=VALUE, or ~KEY to remove a key.")
    fix = f"Quote the value for both the shell and Hydra: \"{key}='...'\"."
    return None, Problem(key, value, f"it cannot be read ({reason}).", fix)


def _line(override: Override) -> str:
    assert override.input_line is not None
    return override.input_line


def _check(override: Override, choices: Choices) -> Problem | None:
    key = override.key_or_group
    value = None if override.is_delete() and override._value is None else override.value()
    shown = _line(override).partition("=")[2]
    if key.startswith(("hydra.", "hydra/")) or key == "hydra":
        fix = f"Use run.dir for the run directory; of Hydra's own keys only {SEARCHPATH} is read."
        return Problem(key, shown, "Hydra composes the configuration here and does nothing else.", fix)
    if override.is_sweep_override():
        fix = (
            f"For a list write {key}=[{shown}], for a string \"{key}='{shown}'\"; 'anyshard train -m' starts one run for each."
        )
        return Problem(key, shown, "it names several values.", fix)
    if (_is_group(key, choices) or "/" in key or override.package is not None) and not isinstance(value, dict):
        return _check_choice(key, value, choices)
    if key in GROUPS and isinstance(value, dict):
        return next((unknown_key(f"{key}.{name}", item) for name, item in value.items() if not find(f"{key}.{name}")), None)
    if key in GROUPS:
        fix = f"Set one of them: {', '.join(k for k in all_keys() if k.startswith(f'{key}.'))}."
        return Problem(key, shown, "this is a group of keys.", fix)
    if find(key) is None:
        known = find(key.rpartition(".")[0])
        if known is not None:
            return Problem(key, shown, f"{known.path} holds a single value.", f"Set {known.path} itself: {known.type_text}.")
        return unknown_key(key, shown)
    return None


def _chooses_nothing(override: Override, choices: Choices) -> bool:
    """Whether it is `local=null` where there is no local configuration anyway, which Hydra would not understand."""
    key = override.key_or_group
    return _is_group(key, choices) and not choices.get(key) and (override.is_delete() or override.value() is None)


def _is_group(key: str, choices: Choices) -> bool:
    return key in choices or key in PRIMARY_GROUPS


def _check_choice(group: str, value: Any, choices: Choices) -> Problem | None:
    if not _is_group(group, choices):
        near = difflib.get_close_matches(group, choices, n=1)
        fix = f"Did you mean {near[0]}? " if near else ""
        return Problem(group, value, "there is no such group.", f"{fix}There are: {', '.join(choices)}.")
    wanted = value if isinstance(value, list) else [value]
    for name in wanted:
        if name is not None and str(name) not in choices.get(group, []):
            return unknown_choice(group, str(name), choices.get(group, []))
    return None


def unknown_choice(group: str, name: str, names: Sequence[str]) -> Problem:
    """The problem that says a group has no file of this name, with the nearest that exists."""
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"Did you mean {group}={near[0]}? " if near else ""
    return Problem(group, name, "there is no such choice.", f"{hint}There are: {', '.join(names)}.")


def _for_hydra(override: Override, choices: Choices) -> str:
    line = _line(override)
    if override.is_delete():
        return line
    bare = line.lstrip("+")
    if not _is_group(override.key_or_group, choices) or isinstance(override.value(), dict):
        return f"++{bare}"
    if override.value() is None:
        return f"~{override.key_or_group}"  # Hydra takes no null for a group
    return bare if override.key_or_group in PRIMARY_GROUPS else f"+{bare}"


PRIMARY_GROUPS = frozenset(
    {*GROUPS, "experiment", "local", "debug"} - {"run", "train", "stop"}  # the groups of the defaults list of config.yaml
)
