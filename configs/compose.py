"""From overrides to a configuration.

`compose` is public. Hydra merges the files (`hydra_merge.py`) once, on the host; types, unknown keys and choices are
checked against the schema here, so that all problems come together, each with a suggestion and the file to blame. Hydra
is imported when something is composed and not before: ranks read frozen configurations and never need it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path

from anyshard.configs.errors import ConfigError
from anyshard.configs.places import is_remote
from anyshard.configs.rules import with_sources
from anyshard.configs.schema import BUILT_IN_TOKENIZERS, RESUME_WORDS, Config
from anyshard.configs.sources import OURS, config_dirs, group_choices, set_by
from anyshard.configs.structure import structure


@dataclass(frozen=True)
class Composition:
    """A composed configuration and how it came about."""

    config: Config
    overrides: tuple[str, ...]
    dirs: tuple[Path, ...]
    lines: tuple[str, ...]  # the overrides as Hydra got them

    @cached_property
    def sources(self) -> dict[str, str]:
        """What set each key that is not at its default: a file, or `override key=value`."""
        return _sources(self.lines, self.dirs)


def compose(overrides: Sequence[str] = (), *, config_dir: Path | str | None = None) -> Config:
    """The configuration that `anyshard train` would use with these overrides, with a run name and folder of its own.

    Args:
        overrides: Hydra overrides, such as `zero=z3` or `train.max_steps=100`.
        config_dir: a folder with configuration files of your own, as `--config-dir`.

    Raises:
        ConfigError: a key or choice is unknown, a value has the wrong type, or a file cannot be read; names all of them.
    """
    return finalize(compose_with_sources(overrides, config_dir=config_dir).config, datetime.now())


def compose_with_sources(overrides: Sequence[str] = (), *, config_dir: Path | str | None = None) -> Composition:
    """Like `compose`, but as written (names not derived yet), and with the file or override that set each key."""
    from anyshard.configs.hydra_merge import merge
    from anyshard.configs.overrides import check_overrides, split_searchpath

    rest, searchpath = split_searchpath(overrides)
    dirs = config_dirs(config_dir, searchpath)
    lines, problems = check_overrides(rest, group_choices(dirs))
    try:
        data = merge(lines, dirs)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from error
    config, wrong = structure(data)
    if wrong:
        problems += with_sources(wrong, _sources(lines, dirs))
    if problems:
        raise ConfigError(problems)
    return Composition(config, tuple(overrides), tuple(dirs), tuple(lines))


def _sources(lines: Sequence[str], dirs: Sequence[Path]) -> dict[str, str]:
    from anyshard.configs.hydra_merge import merged_files

    sources: dict[str, str] = {}
    for file, package in merged_files(lines, dirs):
        shown = f"configs/{file.relative_to(OURS)}" if file.is_relative_to(OURS) else str(file)
        sources.update(dict.fromkeys(set_by(file, package), shown))
    for line in lines:
        key, _, value = line.lstrip("+").partition("=")
        if key.startswith("~"):
            sources[key[1:]] = f"override {key}"
        else:
            sources[key] = f"override {key}={value}"
    return sources


def sweep(overrides: Sequence[str], *, config_dir: Path | str | None = None) -> list[list[str]]:
    """The overrides of each run of a sweep (`anyshard train -m zero=z1,z2`), in Hydra's order.

    Raises:
        ConfigError: an override cannot be read, or a folder does not exist.
    """
    from anyshard.configs.overrides import expand_sweep, split_searchpath

    rest, searchpath = split_searchpath(overrides)
    jobs = expand_sweep(rest, group_choices(config_dirs(config_dir, searchpath)))
    kept = [text for text in overrides if text not in rest]
    return [[*kept, *job] for job in jobs]


def split_arguments(argv: Sequence[str]) -> tuple[list[str], Path | None]:
    """The arguments of a command as (overrides, the folder of `--config-dir`).

    Raises:
        ConfigError: `--config-dir` has no folder, or there is another option.
    """
    overrides: list[str] = []
    config_dir: Path | None = None
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        name, _, value = argument.partition("=")
        if name == "--config-dir":
            if not value and not rest:
                raise ConfigError("--config-dir: it has no folder. Write --config-dir FOLDER.")
            config_dir = Path(value or rest.pop(0))
        elif argument.startswith("-"):
            raise ConfigError(
                f"{argument}: there is no such option. Options: --config-dir FOLDER; the rest are overrides KEY=VALUE."
            )
        else:
            overrides.append(argument)
    return overrides, config_dir


def finalize(config: Config, now: datetime, cwd: Path | None = None) -> Config:
    """Fill in what is derived: the run's name and folder, and absolute paths, since ranks may start elsewhere.

    Args:
        now: the time that goes into the run's name.
        cwd: the folder that relative paths start from; the current one by default.
    """
    result = copy.deepcopy(config)
    base = cwd or Path.cwd()
    if result.run.name is None:
        from_dir = Path(result.run.dir).name if result.run.dir else ""
        result.run.name = from_dir or f"{result.model.name}-{result.data.name}-{now:%Y%m%d-%H%M%S}"
    result.run.dir = _absolute(result.run.dir or f"runs/{result.run.name}", base)
    if result.resume not in RESUME_WORDS:
        result.resume = _absolute(result.resume, base)
    if result.checkpoint.dir is not None:
        result.checkpoint.dir = _absolute(result.checkpoint.dir, base)
    if result.data.source == "text":
        result.data.path = result.data.path and _absolute(result.data.path, base)
        result.data.validation_path = result.data.validation_path and _absolute(result.data.validation_path, base)
    else:
        result.data.path = result.data.path and _absolute_if_here(result.data.path, base)
    if result.data.tokenizer not in BUILT_IN_TOKENIZERS:
        result.data.tokenizer = _absolute_if_here(result.data.tokenizer, base)
    result.model.path = result.model.path and _absolute_if_here(result.model.path, base)
    result.data.cache_dir = result.data.cache_dir and _absolute(result.data.cache_dir, base)
    result.launch.deepspeed.hostfile = result.launch.deepspeed.hostfile and _absolute(result.launch.deepspeed.hostfile, base)
    result.launch.slurm.template = result.launch.slurm.template and _absolute(result.launch.slurm.template, base)
    return result


def _absolute(path: str, base: Path) -> str:
    return path if is_remote(path) else str(base / Path(path).expanduser())


def _absolute_if_here(path_or_id: str, base: Path) -> str:
    """A path that exists, absolute; a hub id stays as it is."""
    found = _absolute(path_or_id, base)
    return found if Path(found).exists() else path_or_id
