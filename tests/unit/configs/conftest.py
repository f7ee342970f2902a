"""No configuration folder of the person who runs the tests, and a package of somebody else's to run them on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from anyshard.configs import registry

PLUGIN = {
    "their_plugin/__init__.py": "",
    "their_plugin/optim.py": (
        "def build(groups, optimizer, *, offloaded, device):\n    return ('theirs', optimizer.options['momentum'])\n"
    ),
    "their_plugin/schedules.py": "def halves(schedule, max_steps):\n    return lambda step: 0.5 ** step\n",
    "their_plugin-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: their-plugin\nVersion: 1.0\n",
    "their_plugin-1.0.dist-info/entry_points.txt": (
        "[anyshard.plugins]\n"
        "optimizer.theirs = their_plugin.optim:build\n"
        "schedule.halves = their_plugin.schedules:halves\n"
        "callback.broken = their_plugin.missing:Callback\n"
        "pets.cat = their_plugin:cat\n"
    ),
    "their_plugin/settings/__init__.py": "",
    "their_plugin/settings/optimizer/theirs.yaml": "# Theirs.\nname: theirs\nlr: 0.5\noptions:\n  momentum: 0.25\n",
    "their_plugin/settings/schedule/halves.yaml": "name: halves\n",
    "their_plugin/settings/experiment/their_run.yaml": (
        "# @package _global_\n"
        "defaults:\n  - override /model: tiny\n  - override /optimizer: theirs\n  - override /schedule: halves\n\nseed: 11\n"
    ),
}


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A small installed package that brings an optimizer, a schedule and configuration files; returns its folder."""
    for name, text in PLUGIN.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    registry._plugins.cache_clear()
    yield tmp_path / "their_plugin"
    registry._plugins.cache_clear()


@pytest.fixture(autouse=True)
def _no_config_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANYSHARD_CONFIG_DIR", raising=False)
