from __future__ import annotations

from pathlib import Path

import pytest

from anyshard.configs import registry
from anyshard.configs.errors import ConfigError, EnvError


def test_members_of_ours_can_all_be_imported() -> None:
    for kind, members in registry._OURS.items():
        for name in members:
            assert callable(registry.lookup(kind, name, key=kind)), (kind, name)


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"optimizer.name=adamv: no optimizer of this name.*Did you mean adamw\? There are: adagrad, adamw"
    ):
        registry.lookup("optimizer", "adamv", key="optimizer.name")


def test_a_script_registers_in_its_own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._REGISTERED, "schedule", {})

    @registry.register("schedule", "mine")
    def mine(schedule: object, max_steps: int) -> None:
        pass

    assert registry.lookup("schedule", "mine", key="schedule.name") is mine
    assert "mine" in registry.names("schedule")
    registry.register("schedule", "mine")(mine)  # a module that is imported twice
    with pytest.raises(ValueError, match="registered already"):
        registry.register("schedule", "mine")(test_an_unknown_name_gets_the_nearest)
    with pytest.raises(ValueError, match="registered already"):
        registry.register("schedule", "cosine")(mine)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown kind 'pets'"):
        registry.register("pets", "cat")(object)


def test_a_plugin_adds_names(plugin: Path) -> None:
    assert "theirs" in registry.names("optimizer")
    assert registry.lookup("schedule", "halves", key="schedule.name")(None, 10)(2) == 0.25


def test_a_plugin_that_cannot_be_imported_is_the_environments_fault(plugin: Path) -> None:
    with pytest.raises(EnvError, match=r"callbacks.broken=broken: the plugin their_plugin.missing:Callback cannot be loaded"):
        registry.lookup("callback", "broken", key="callbacks.broken")
