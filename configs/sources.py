"""Where configuration files are, and which of them, or which override, set each key.

The folder of this file comes first; then `--config-dir`, `$ANYSHARD_CONFIG_DIR` and `hydra.searchpath`. A file of a user
cannot hide one of ours: Hydra would silently take ours, so that is an error.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from anyshard.configs.errors import ConfigError, Problem
from anyshard.configs.keys import leaves

CONFIG_DIR_ENV = "ANYSHARD_CONFIG_DIR"
OURS = Path(__file__).resolve().parent
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml is ten times faster, where PyYAML was built with it


def config_dirs(config_dir: Path | str | None, searchpath: Sequence[str]) -> list[Path]:
    """The folders that hold configuration files, ours first.

    Args:
        config_dir: the argument of `--config-dir`.
        searchpath: the entries of `hydra.searchpath`: `file:///folder`, `pkg://package.module` or a folder.

    Raises:
        ConfigError: a folder does not exist, or a file in it is hidden by one of an earlier folder.
    """
    wanted = [("--config-dir", str(config_dir))] if config_dir is not None else []
    wanted += [(CONFIG_DIR_ENV, entry) for entry in os.environ.get(CONFIG_DIR_ENV, "").split(os.pathsep) if entry]
    wanted += [("hydra.searchpath", entry) for entry in searchpath]
    dirs = [OURS]
    problems: list[Problem] = []
    for key, entry in wanted:
        folder = _folder(entry)
        if folder is None or not folder.is_dir():
            problems.append(Problem(key, entry, "there is no such folder.", "Give a folder that holds GROUP/NAME.yaml files."))
        elif folder not in dirs:
            problems += _hidden(key, folder, dirs)
            dirs.append(folder)
    if problems:
        raise ConfigError(problems)
    return dirs


def _folder(entry: str) -> Path | None:
    if entry.startswith("pkg://"):
        try:
            spec = find_spec(entry.removeprefix("pkg://").replace("/", "."))
        except ImportError:
            return None
        places = list(spec.submodule_search_locations or []) if spec else []
        return Path(places[0]).resolve() if places else None
    return Path(entry.removeprefix("file://")).expanduser().resolve()


def _hidden(key: str, folder: Path, earlier: Sequence[Path]) -> list[Problem]:
    problems = []
    for file in _yaml_files(folder):
        owner = next((other for other in earlier if (other / file).is_file()), None)
        if owner is not None:
            reason = f"its {file} has the name of a file in {owner}, which comes first."
            problems.append(Problem(key, folder, reason, "Rename yours."))
    return problems


def _yaml_files(folder: Path) -> list[Path]:
    return sorted(file.relative_to(folder) for file in folder.rglob("*.yaml"))


def group_choices(dirs: Sequence[Path]) -> dict[str, list[str]]:
    """The choices of every group, by group: {"zero": ["z0", "z1", "z2", "z3"], ...}."""
    choices: dict[str, set[str]] = {}
    for folder in dirs:
        for file in _yaml_files(folder):
            parts = file.with_suffix("").parts
            for split in range(1, len(parts)):
                choices.setdefault("/".join(parts[:split]), set()).add("/".join(parts[split:]))
    return {group: sorted(names) for group, names in sorted(choices.items())}


def find_file(dirs: Sequence[Path], config_path: str) -> Path | None:
    """The file of a Hydra config path such as `model/tiny`; the first folder wins."""
    return next((file for folder in dirs if (file := folder / f"{config_path}.yaml").is_file()), None)


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file; empty for an empty file."""
    data = yaml.load(file.read_text(encoding="utf-8"), Loader=_LOADER)
    return data if isinstance(data, dict) else {}


def set_by(file: Path, package: str) -> dict[str, Any]:
    """The keys that a file sets, with their values.

    Args:
        package: where its content goes; empty for the root.
    """
    data = {name: item for name, item in read_yaml(file).items() if name not in ("defaults", "hydra")}
    return leaves(data, package) if data else {}
