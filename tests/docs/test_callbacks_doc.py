"""docs/callbacks.md has every callback with its options and their defaults."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest

from anyshard.configs import registry

PAGE = (Path(__file__).parents[2] / "docs" / "callbacks.md").read_text()


@pytest.mark.parametrize("name", registry.names("callback"))
def test_every_option_is_there_with_its_default(name):
    rows = re.search(rf"\| `{name}` \|.*?(?=\n\| `|\n\n)", PAGE, re.DOTALL)
    assert rows, f"docs/callbacks.md lacks {name}"
    told = dict(re.findall(r"\| \| `(\w+)` \| `?([^|`]+?)`? \|", rows[0]))
    options = inspect.signature(registry.lookup("callback", name, key="callbacks")).parameters
    assert {key: json.loads(value) for key, value in told.items()} == {
        key: option.default for key, option in options.items() if option.kind is option.POSITIONAL_OR_KEYWORD
    }
