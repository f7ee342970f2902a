from __future__ import annotations

import io
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from anyshard.configs.errors import ConfigError
from anyshard.configs.keys import all_keys
from anyshard.configs.structure import structure_or_raise
from anyshard.launch.config import explain, ls, show


def _console(*, terminal: bool = False) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=200, force_terminal=terminal), out


def test_ls_names_groups_choices_and_the_default() -> None:
    console, out = _console()
    ls(console=console)
    lines = {line.split()[0]: line for line in out.getvalue().splitlines() if line.strip()}
    assert "z0, z1 (default), z2, z3" in lines["zero"]
    assert "cpu_quickstart" in lines["experiment"]


def test_ls_of_a_group_says_what_each_choice_is(tmp_path: Path) -> None:
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero/mine.yaml").write_text("# Of my own.\nstage: 2\n")
    console, out = _console()
    ls("zero", config_dir=tmp_path, console=console)
    assert "zero=mine  Of my own." in out.getvalue()
    assert "sharded over dp. (default)" in out.getvalue()


def test_ls_of_an_unknown_group() -> None:
    with pytest.raises(ConfigError, match="Did you mean group=zero"):
        ls("zer")


def test_show_prints_yaml_that_can_be_read_back() -> None:
    console, out = _console()
    show(["zero=z3", "train.max_steps=7"], console=console)
    assert "\x1b" not in out.getvalue()
    config = structure_or_raise(yaml.safe_load(out.getvalue()))
    assert (config.zero.stage, config.train.max_steps) == (3, 7)


def test_show_has_colours_on_a_terminal() -> None:
    console, out = _console(terminal=True)
    show([], console=console)
    assert "\x1b" in out.getvalue()


def test_show_changed_names_only_what_differs_and_what_set_it() -> None:
    console, out = _console()
    show(["zero=z3", "train.max_steps=7"], changed=True, console=console)
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert lines == [
        ["key", "without", "with", "set", "by"],
        ["zero.stage", "1", "3", "configs/zero/z3.yaml"],
        ["train.max_steps", "1000", "7", "override", "train.max_steps=7"],
    ]


def test_explain_says_all_there_is_to_know() -> None:
    console, out = _console()
    explain("train.max_grad_norm", ["train.max_grad_norm=2"], console=console)
    text = out.getvalue()
    assert text.startswith("train.max_grad_norm = 2.0\n")
    for part in ("clipped", "type: number", "range: >= 0", "default: 1.0", "reason:", "set by: override train.max_grad_norm=2"):
        assert part in text


def test_explain_of_a_default() -> None:
    console, out = _console()
    explain("stop", console=console)
    assert out.getvalue().count("set by: nothing: this is the default") == 3


def test_explain_without_a_key_lists_all() -> None:
    console, out = _console()
    explain(None, console=console)
    for path in all_keys():
        assert path in out.getvalue()


def test_explain_of_an_unknown_key() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean optimizer\.lr"):
        explain("lr")
