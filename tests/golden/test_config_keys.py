"""The public surface: every configuration key with its type and default. Others script against it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.golden import compare

from anyshard.configs.keys import all_keys


def test_keys(pytestconfig: pytest.Config) -> None:
    lines = [f"{key.path}: {key.type_text} = {json.dumps(key.default)}\n" for key in all_keys().values()]
    compare(Path(__file__).parent / "config_keys.txt", "".join(lines), pytestconfig)
