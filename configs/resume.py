"""The configuration of a resumed run: the frozen one with overrides of what may differ (`frozen.RESUMABLE_KEYS`)."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from anyshard.configs.compose import finalize
from anyshard.configs.errors import ConfigError, Problem
from anyshard.configs.frozen import diff, fixed_changes, has_progress, is_resumable, load_frozen
from anyshard.configs.keys import plain
from anyshard.configs.schema import GROUPS, Config, Stop
from anyshard.configs.sources import config_dirs, group_choices
from anyshard.configs.structure import structure

_NEW_RUNS_ONLY = ("experiment", "debug", "local")


def override_frozen(
    run_dir: Path, overrides: Sequence[str], *, force: bool = False, config_dir: Path | str | None = None
) -> Config:
    """The frozen configuration of a run with these overrides, `zero=z3` and `train.max_steps=500` alike.

    dp is derived anew from the number of ranks, and the run is continued from its newest checkpoint unless an override
    says otherwise.

    Args:
        force: accept overrides that change the mathematics of the run; a run that has not trained a step takes them anyway.

    Raises:
        ConfigError: an override is wrong, or changes the mathematics of the run; names all of them.
    """
    from anyshard.configs.hydra_merge import merge
    from anyshard.configs.overrides import check_overrides, split_searchpath

    frozen = load_frozen(run_dir)
    rest, searchpath = split_searchpath(overrides)
    dirs = config_dirs(config_dir, searchpath)
    choices = {group: names for group, names in group_choices(dirs).items() if group not in _NEW_RUNS_ONLY}
    new_only = [text for text in rest if text.lstrip("+~").partition("=")[0] in _NEW_RUNS_ONLY]
    lines, problems = check_overrides([text for text in rest if text not in new_only], choices)
    problems += [_new_run_only(text) for text in new_only]
    base = {"defaults": ["_self_", *({group: None} for group in GROUPS if group in choices)], **plain(frozen)}
    config, wrong = structure(merge(lines, dirs, primary=base))
    problems += wrong
    if problems:
        raise ConfigError(problems)
    named = {line.lstrip("+").partition("=")[0] for line in lines}
    _derive(config, named, run_dir)
    config = finalize(config, datetime.now())
    if not force and has_progress(run_dir, frozen) and fixed_changes(frozen, config):
        raise ConfigError([_fixed(key, new, old) for key, old, new in diff(frozen, config) if not is_resumable(key)])
    return config


def _derive(config: Config, named: set[str], run_dir: Path) -> None:
    config.run.dir = str(run_dir.absolute())
    if "parallel.dp" not in named:
        config.parallel.dp = "auto"
    if "cluster" in named and "launch.procs_per_node" not in named:
        config.launch.procs_per_node = "auto"
    if "resume" not in named and config.resume != "must":
        config.resume = "auto"
    if not any(name == "stop" or name.startswith("stop.") for name in named):
        config.stop = Stop()  # the stop of an earlier launch has happened


def _new_run_only(override: str) -> Problem:
    key, _, value = override.lstrip("+~").partition("=")
    return Problem(key, value, "it describes a new run.", "Give the keys that are to change, or use 'anyshard train'.")


def _fixed(key: str, value: object, frozen: object) -> Problem:
    reason = f"the run was started with {frozen}, and this would change its mathematics."
    return Problem(key, value, reason, "Start a new run, or add --force (it is recorded in overrides.yaml).")
