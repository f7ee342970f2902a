"""A package of somebody else's: its optimizer and schedule by entry point, its configuration files both ways."""

from __future__ import annotations

from pathlib import Path

import pytest

from anyshard.configs import registry
from anyshard.configs.compose import compose, compose_with_sources
from anyshard.configs.errors import ConfigError
from anyshard.configs.rules import check
from anyshard.configs.schema import Config
from anyshard.configs.world import resolve_world


def _use(config: Config) -> None:
    config = resolve_world(config, devices_found=0)
    assert check(config) == []
    assert (config.optimizer.name, config.optimizer.lr, config.schedule.name, config.seed) == ("theirs", 0.5, "halves", 11)
    build = registry.lookup("optimizer", config.optimizer.name, key="optimizer.name")
    assert build([], config.optimizer, offloaded=False, device=None) == ("theirs", 0.25)


@pytest.mark.parametrize("way", ["file://{folder}", "{folder}", "pkg://their_plugin.settings"])
def test_by_searchpath(plugin: Path, way: str) -> None:
    place = way.format(folder=plugin / "settings")
    _use(compose([f"hydra.searchpath=[{place}]", "experiment=their_run"]))


def test_by_config_dir(plugin: Path) -> None:
    composition = compose_with_sources(["experiment=their_run"], config_dir=plugin / "settings")
    _use(composition.config)
    assert composition.sources["optimizer.options.momentum"] == str(plugin / "settings/optimizer/theirs.yaml")


def test_by_environment(plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYSHARD_CONFIG_DIR", str(plugin / "settings"))
    _use(compose(["experiment=their_run"]))


def test_a_folder_with_an_awkward_name(plugin: Path, tmp_path: Path) -> None:
    folder = tmp_path / "it's a [folder], isn't it"
    (plugin / "settings").rename(folder)
    _use(compose(["experiment=their_run"], config_dir=folder))


def test_without_the_folder_their_choice_is_unknown(plugin: Path) -> None:
    with pytest.raises(ConfigError, match="optimizer=theirs: there is no such choice"):
        compose(["optimizer=theirs"])


def test_without_the_package_their_optimizer_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer/theirs.yaml").write_text("name: theirs\n")
    problems = check(compose(["optimizer=theirs"], config_dir=tmp_path))
    assert [problem.key for problem in problems] == ["optimizer.name"]
