"""All that is asked of Hydra: follow the defaults lists, merge the files, apply the overrides. Works with 1.3 and 1.4.

Hydra's and OmegaConf's errors leave here as ours. Overrides must have passed `overrides.check_overrides`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from anyshard.configs.errors import ConfigError, Problem
from anyshard.configs.keys import plain
from anyshard.configs.overrides import unknown_choice
from anyshard.configs.schema import Config
from anyshard.configs.sources import find_file

PRIMARY = "config"
"""Name of the primary configuration, `config.yaml`."""
_GIVEN = "given"


@contextmanager
def _hydra(dirs: Sequence[Path], given: dict[str, Any] | None = None) -> Iterator[None]:
    """Hydra set up on our folder; what it was before (the caller may be a Hydra application) is restored at the end."""
    # 1.3 warns when version_base is missing, 1.4 when it is given; 1.4 wants to be told that an entry may be replaced
    is_new = hydra.__version__ >= "1.4"
    version: dict[str, Any] = {} if is_new else {"version_base": "1.3"}
    replace: dict[str, Any] = {"replace": True} if is_new else {}
    ConfigStore.instance().store(group="anyshard", name="schema", node=plain(Config()), **replace)
    if given is not None:
        ConfigStore.instance().store(name=_GIVEN, node=given, **replace)
    callers = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(dirs[0]), **version):
            yield
    finally:
        GlobalHydra.instance().hydra = callers


def _searchpath(dirs: Sequence[Path]) -> list[str]:
    """The override that tells Hydra about the folders after ours."""
    entries = [f"'file://{_escape(str(folder))}'" for folder in dirs[1:]]
    return [f"hydra.searchpath=[{','.join(entries)}]"] if entries else []


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("'", "\\'")


def merge(lines: Sequence[str], dirs: Sequence[Path], *, primary: dict[str, Any] | None = None) -> dict[str, Any]:
    """The merged configuration as plain data, interpolations resolved.

    Args:
        lines: overrides, as `check_overrides` returns them.
        dirs: folders of configuration files, ours first.
        primary: a primary configuration with its defaults list, in place of `config.yaml`.

    Raises:
        ConfigError: a file is missing or cannot be read, or its content cannot be merged.
    """
    try:
        with _hydra(dirs, primary):
            merged = hydra.compose(PRIMARY if primary is None else _GIVEN, overrides=[*_searchpath(dirs), *lines])
        data = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except MissingConfigException as error:
        raise ConfigError(_missing_file(error)) from error
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(_translate(error)) from error
    assert isinstance(data, dict)
    return {str(name): item for name, item in data.items()}


def merged_files(lines: Sequence[str], dirs: Sequence[Path]) -> list[tuple[Path, str]]:
    """The files that Hydra merges, in order, each with the place that its content goes to (empty: the root)."""
    with _hydra(dirs):
        hydra_object = GlobalHydra.instance().hydra
        assert hydra_object is not None
        defaults = hydra_object.config_loader.compute_defaults_list(PRIMARY, [*_searchpath(dirs), *lines], RunMode.RUN)
    found = [(find_file(dirs, default.config_path or ""), default.package or "") for default in defaults.defaults]
    return [(file, package) for file, package in found if file is not None]


def _missing_file(error: MissingConfigException) -> Problem:
    group, _, name = (error.missing_cfg_file or PRIMARY).rpartition("/")
    problem = unknown_choice(group, name, list(error.options or []))
    place = str(error).splitlines()[0].removesuffix(".")
    return Problem(problem.key, problem.value, f"there is no such file. {place}.", problem.fix)


def _translate(error: Exception) -> Problem:
    """An error of Hydra, OmegaConf or PyYAML as a problem: the innermost cause says most."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, yaml.MarkedYAMLError) and cause.problem_mark is not None:
        mark = cause.problem_mark
        fix = f"Correct it at column {mark.column + 1}."
        return Problem(f"{mark.name}:{mark.line + 1}", cause.problem, "this is not valid YAML.", fix)
    reason = " ".join(str(cause).split())
    context = " ".join(str(error).split()) if cause is not error else ""
    where = f" ({context})" if context else ""
    fix = f"Correct it{where}; 'anyshard config ls' lists groups, 'anyshard config explain' keys."
    key = getattr(cause, "full_key", None) or getattr(error, "full_key", None)  # in a debugger the causes differ
    return Problem(str(key or "configuration"), None, f"{reason}.", fix)
