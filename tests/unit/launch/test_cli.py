"""What `--help` promises, and what the commands hand on."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from helpers.configs import make_config
from typer.main import get_command

from anyshard.configs.errors import ConfigError
from anyshard.configs.frozen import freeze
from anyshard.launch import cli


def options() -> list[tuple[str, str, str | None]]:
    """Every option of every command: (command, option, help)."""
    found, waiting = [], [("anyshard", get_command(cli.app))]
    while waiting:
        name, command = waiting.pop()
        waiting += [(f"{name} {child}", each) for child, each in getattr(command, "commands", {}).items()]
        found += [(name, param.opts[0], getattr(param, "help", None)) for param in command.params if param.name != "help"]
    return found


@pytest.mark.parametrize(("command", "option", "text"), options(), ids=lambda value: str(value)[:40])
def test_every_option_says_what_it_does(command: str, option: str, text: str | None) -> None:
    assert text, f"{command}: {option} has no help"


def test_resume_takes_files_of_the_users_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--config-dir` reaches the composition: a choice of this folder is known, and without it is not."""
    run, folder = tmp_path / "run", tmp_path / "mine"
    (folder / "zero").mkdir(parents=True)
    (folder / "zero" / "mine.yaml").write_text("stage: 2\n")
    config = make_config({"run.dir": str(run)})
    freeze(config, [], run)
    with pytest.raises(ConfigError, match="zero=mine"):
        cli.resume(run, ["zero=mine"], dry_run=True)
    with pytest.raises(typer.Exit) as left:
        cli.resume(run, ["zero=mine"], config_dir=folder, dry_run=True)
    assert left.value.exit_code == 0
    assert "ZeRO 2" in capsys.readouterr().out


def test_ctrl_c_needs_no_traceback(monkeypatch, capsys):
    def pressed():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", pressed)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == cli.EXIT_CTRL_C
    assert capsys.readouterr().err == ""
