"""The frozen configuration of a run: what is written into the run directory, read back by every rank, and compared on resume.

No Hydra here, so that ranks start fast. The file holds every key with its value; reading it checks types as composing does.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from anyshard.configs.errors import ConfigError, Problem
from anyshard.configs.keys import flatten, plain
from anyshard.configs.places import place
from anyshard.configs.schema import Config
from anyshard.configs.structure import structure
from anyshard.configs.writing import write_file, writing

CONFIG_FILE = "config.yaml"
OVERRIDES_FILE = "overrides.yaml"

RESUMABLE_KEYS: tuple[str, ...] = (
    "run",
    "resume",
    # layout: who computes what
    "parallel",
    "zero",
    "offload",
    "launch",
    "cluster",
    "train.micro_batch_size",
    "train.activation_checkpointing",
    "model.attention",
    # lengths and intervals
    "train.max_steps",
    "train.eval_every_steps",
    "train.eval_samples",
    "train.log_every_steps",
    "checkpoint",
    "stop",
    # what watches the run, and names
    "train.detect_hang_s",
    "train.detect_nan",
    "tracking",
    "callbacks",
    "model.name",
    "model.trust_remote_code",
    "data.name",
    "data.cache_dir",
)
"""Keys and groups that may differ when a run is resumed; all others define its mathematics."""

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml is ten times faster, where PyYAML was built with it
_PACKAGES = ("anyshard", "torch", "deepspeed", "transformers", "hydra-core", "omegaconf", "numpy", "safetensors", "tokenizers")


def is_resumable(key: str) -> bool:
    """Whether this key may differ when a run is resumed."""
    return any(key == name or key.startswith(f"{name}.") for name in RESUMABLE_KEYS)


def fingerprint(config: Config) -> str:
    """A hash of everything that defines the mathematics of the run."""
    fixed = {key: value for key, value in flatten(config).items() if not is_resumable(key)}
    return hashlib.blake2b(json.dumps(fixed, sort_keys=True).encode(), digest_size=16).hexdigest()


def diff(a: Config, b: Config) -> list[tuple[str, Any, Any]]:
    """The keys whose values differ: (key, value in a, value in b); None where an open mapping lacks the key."""
    left, right = flatten(a), flatten(b)
    order = [*left, *(key for key in right if key not in left)]
    return [(key, left.get(key), right.get(key)) for key in order if left.get(key) != right.get(key)]


def run_dir_of(config: Config) -> Path:
    """The run directory.

    Raises:
        ConfigError: the configuration was built by hand and has none.
    """
    if config.run.dir is None:
        raise ConfigError(
            Problem("run.dir", None, "this configuration has no run directory.", "Set run.dir, or use compose().")
        )
    return Path(config.run.dir)


def checkpoint_dir_of(config: Config) -> Path:
    """The folder of the run's checkpoints."""
    return place(config.checkpoint.dir) if config.checkpoint.dir else run_dir_of(config) / "checkpoints"


def checkpoint_dir_in(run_dir: Path) -> Path:
    """The folder of the checkpoints of the run in this directory, which may be elsewhere (`checkpoint.dir`).

    A run directory that was moved, or whose configuration cannot be read, has them where they are by default.
    """
    try:
        configured = load_frozen(run_dir).checkpoint.dir
    except ConfigError:
        configured = None
    return place(configured) if configured else run_dir / "checkpoints"


def freeze(config: Config, overrides: Sequence[str], run_dir: Path) -> None:
    """Write the configuration into the run directory, and add this launch to the list of launches.

    Raises:
        EnvError: the directory cannot be written.
    """
    launches: list[dict[str, Any]] = []
    changed: list[tuple[str, Any, Any]] = []
    if (run_dir / CONFIG_FILE).is_file():
        launches = _read(run_dir / OVERRIDES_FILE) if (run_dir / OVERRIDES_FILE).is_file() else []
        changed = diff(load_frozen(run_dir), config)
        if not changed and not overrides:
            return  # a rank that was started by hand on a frozen directory adds nothing
    launch: dict[str, Any] = {"overrides": list(overrides)}
    if changed:
        launch["changed"] = {key: {"from": old, "to": new} for key, old, new in changed}
    with writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
    write_file(run_dir / CONFIG_FILE, yaml.safe_dump(plain(config), sort_keys=False))
    write_file(run_dir / OVERRIDES_FILE, yaml.safe_dump([*launches, launch], sort_keys=False))


def _read(file: Path) -> Any:
    try:
        return yaml.load(file.read_text(encoding="utf-8"), Loader=_LOADER)
    except FileNotFoundError as error:
        fix = "Give the folder of a run, or start one with 'anyshard train'."
        why = f"it holds no {file.name}." if file.parent.is_dir() else "there is no such folder."
        raise ConfigError(Problem("run directory", file.parent, why, fix)) from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(
            Problem("run directory", file.parent, f"{file.name} cannot be read ({text}).", "Repair it.")
        ) from error


def load_frozen(run_dir: Path) -> Config:
    """The configuration that was frozen in a run directory.

    Raises:
        ConfigError: there is none, it cannot be read, or it does not fit the schema (all problems together).
    """
    file = run_dir / CONFIG_FILE
    data = _read(file)
    if not isinstance(data, dict):
        raise ConfigError(Problem("run directory", run_dir, f"{CONFIG_FILE} is not a configuration.", "Repair it."))
    config, problems = structure(data)
    if problems:
        raise ConfigError([Problem(p.key, p.value, p.reason, f"{p.fix} (Set in {file}.)") for p in problems])
    return config


def after_restart(config: Config, run_dir: Path) -> Config:
    """The configuration of ranks that torchrun or Slurm starts again within one launch.

    What `resume=never` or `resume=PATH` asked for has happened once this launch has committed a checkpoint.
    """
    if config.resume in ("auto", "must"):
        return config
    frozen_at = (run_dir / CONFIG_FILE).stat().st_mtime
    saved = [path.stat().st_mtime for path in checkpoint_dir_of(config).glob("step-*/COMMIT")]
    return dataclasses.replace(config, resume="auto") if saved and max(saved) > frozen_at else config


def check_run_dir(config: Config, run_dir: Path, *, force: bool = False) -> None:
    """Refuse a run directory that holds another run: one with other mathematics.

    Args:
        force: accept it all the same; `freeze` records what changed.

    Raises:
        ConfigError: names the keys that differ.
    """
    if force or not (run_dir / CONFIG_FILE).is_file():
        return
    held = load_frozen(run_dir)
    fixed = fixed_changes(held, config)
    if fixed and has_progress(run_dir, held):
        fix = "Choose another run.dir, or go on with 'anyshard resume'."
        raise ConfigError(Problem("run.dir", run_dir, f"it holds a run with {'; '.join(fixed)}.", fix))


def has_progress(run_dir: Path, held: Config) -> bool:
    """Whether a run directory holds anything that could be lost or mixed up: a logged step or a checkpoint.

    One that a failed start left behind does not; the next start may use it with another configuration.
    """
    metrics = run_dir / "metrics.jsonl"
    checkpoints = place(held.checkpoint.dir) if held.checkpoint.dir else run_dir / "checkpoints"
    return (metrics.is_file() and metrics.stat().st_size > 0) or any(checkpoints.glob("step-*"))


def fixed_changes(old: Config, new: Config) -> list[str]:
    """What differs and may not differ on resume, in words: "seed=1 (here 2)"."""
    return [f"{key}={_text(was)} (here {_text(now)})" for key, was, now in diff(old, new) if not is_resumable(key)]


def _text(value: Any) -> str:
    return json.dumps(value) if not isinstance(value, str) else value


def environment() -> dict[str, Any]:
    """What a run was started with: versions and machine, for `env.json`."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "packages": dict(_versions(_PACKAGES)),
    }


def _versions(names: Iterable[str]) -> Iterable[tuple[str, str | None]]:
    for name in names:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            yield name, None
