"""Names of everything that can be chosen by name, and where its code is; nothing is imported before it is used.

Members of ours are listed here as import strings, so that the host can check a name without importing torch. A package
adds a member by an entry point of the group `anyshard.plugins` whose name is `<kind>.<name>`:

    [project.entry-points."anyshard.plugins"]
    "optimizer.adan" = "my_package.optim:build_adan"

and a script adds one in its own process with `@register("optimizer", "adan")`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from anyshard.configs.errors import ConfigError, EnvError, Problem

PLUGIN_GROUP = "anyshard.plugins"

_OURS: dict[str, dict[str, str]] = {
    "data": {
        "python_stdlib": "anyshard.trainer.data.sources:python_stdlib",
        "text": "anyshard.trainer.data.sources:text",
        "hf": "anyshard.trainer.data.sources:hf",
        "synthetic": "anyshard.trainer.data.sources:synthetic",
    },
    "model": {"hf": "anyshard.trainer.models.hf:build"},
    "optimizer": {
        "adagrad": "anyshard.trainer.optim.adagrad:build",
        "adamw": "anyshard.trainer.optim.adamw:build",
        "lion": "anyshard.trainer.optim.lion:build",
        "sgd": "anyshard.trainer.optim.sgd:build",
    },
    "schedule": {
        "constant": "anyshard.trainer.optim.schedules:constant",
        "cosine": "anyshard.trainer.optim.schedules:cosine",
        "linear": "anyshard.trainer.optim.schedules:linear",
        "wsd": "anyshard.trainer.optim.schedules:wsd",
    },
    "callback": {
        "curves": "anyshard.trainer.callbacks.curves:Curves",
        "profiler": "anyshard.trainer.callbacks.profiler:Profiler",
        "sample_text": "anyshard.trainer.callbacks.sample_text:SampleText",
        "unigram": "anyshard.trainer.callbacks.unigram:Unigram",
    },
    "launch": {
        "deepspeed": "anyshard.launch.backend_deepspeed:DeepspeedBackend",
        "local": "anyshard.launch.backend_local:LocalBackend",
        "slurm": "anyshard.launch.backend_slurm:SlurmBackend",
        "torchrun": "anyshard.launch.backend_torchrun:TorchrunBackend",
    },
}
_REGISTERED: dict[str, dict[str, Any]] = {kind: {} for kind in _OURS}

T = TypeVar("T")


def register(kind: str, name: str) -> Callable[[T], T]:
    """Add a member in this process: `@register("optimizer", "adan")`.

    Raises:
        ValueError: the kind is unknown or the name is taken.
    """

    def add(target: T) -> T:
        if kind not in _OURS:
            raise ValueError(f"unknown kind {kind!r}: one of {', '.join(_OURS)}")
        if name in names(kind) and _REGISTERED[kind].get(name) is not target:
            raise ValueError(f"{kind} {name!r} is registered already: choose another name")
        _REGISTERED[kind][name] = target
        return target

    return add


@lru_cache(maxsize=1)
def _plugins() -> dict[str, dict[str, EntryPoint]]:
    found: dict[str, dict[str, EntryPoint]] = {kind: {} for kind in _OURS}
    for point in entry_points(group=PLUGIN_GROUP):
        kind, _, name = point.name.partition(".")
        if kind in found and name:
            found[kind][name] = point
    return found


def names(kind: str) -> list[str]:
    """Every name that can be chosen for this kind, sorted."""
    return sorted({*_OURS[kind], *_REGISTERED[kind], *_plugins()[kind]})


def lookup(kind: str, name: str, *, key: str) -> Any:
    """The object registered under `name`.

    Args:
        kind: "optimizer", "data", ...
        key: the configuration key that held the name, for the error.

    Raises:
        ConfigError: nothing is registered under that name.
        EnvError: a plugin of that name cannot be imported.
    """
    if name in _REGISTERED[kind]:
        return _REGISTERED[kind][name]
    if name in _OURS[kind]:
        module, _, attribute = _OURS[kind][name].partition(":")
        return getattr(import_module(module), attribute)
    if name in _plugins()[kind]:
        point = _plugins()[kind][name]
        try:
            return point.load()
        except (ImportError, AttributeError) as error:
            reason = f"the plugin {point.value} cannot be loaded ({error})."
            raise EnvError(f"{key}={name}: {reason} Repair or remove the package that brings it.") from error
    raise ConfigError(unknown_name(kind, name, key=key))


def unknown_name(kind: str, name: str, *, key: str) -> Problem:
    """The problem that says `name` is not registered, with the nearest that is."""
    near = difflib.get_close_matches(name, names(kind), n=1)
    fix = f"Did you mean {near[0]}? " if near else ""
    return Problem(key, name, f"no {kind} of this name is registered.", f"{fix}There are: {', '.join(names(kind))}.")
