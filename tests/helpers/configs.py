"""Configurations for tests, built in Python without Hydra."""

from __future__ import annotations

from enum import Enum
from typing import Any

from anyshard.configs.schema import Config


def make_config(changes: dict[str, Any] | None = None) -> Config:
    """A configuration that passes all rules on one rank, with changes: `{"zero.stage": 3}`."""
    config = Config()
    config.model.name = "tiny"
    config.model.config = {"model_type": "llama", "vocab_size": 272, "max_position_embeddings": 2048}
    config.launch.procs_per_node = 1
    for path, value in (changes or {}).items():
        set_key(config, path, value)
    return config


def set_key(config: Config, path: str, value: Any) -> None:
    """Set a key by its dotted path; a string becomes the member of an enumeration where the key is one."""
    owner: Any = config
    *parents, name = path.split(".")
    for parent in parents:
        owner = owner[parent] if isinstance(owner, dict) else getattr(owner, parent)
    if isinstance(owner, dict):
        owner[name] = value
        return
    assert hasattr(owner, name), path
    present = getattr(owner, name)
    setattr(owner, name, type(present)(value) if isinstance(present, Enum) else value)
