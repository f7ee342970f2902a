"""`anyshard config ls | show | explain`: what can be chosen, what a run would use, and what a key does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from anyshard.configs import explain as explaining
from anyshard.configs.compose import compose_with_sources
from anyshard.configs.errors import ConfigError
from anyshard.configs.explain import DEFAULT_SOURCE, Explanation, source_of
from anyshard.configs.frozen import diff
from anyshard.configs.keys import all_keys, plain
from anyshard.configs.overrides import unknown_choice
from anyshard.configs.reference import describe_file
from anyshard.configs.sources import config_dirs, find_file, group_choices, read_yaml
from anyshard.launch.console import make_console


def ls(group: str | None = None, *, config_dir: Path | None = None, console: Console | None = None) -> None:
    """Print every group with its choices, the default one marked; of one group, what each choice is.

    Raises:
        ConfigError: there is no such group, or no such folder.
    """
    console = console or make_console()
    dirs = config_dirs(config_dir, [])
    choices = {name: names for name, names in group_choices(dirs).items() if "/" not in name}
    if group is not None and group not in choices:
        raise ConfigError(unknown_choice("group", group, list(choices)))
    defaults = _default_choices(dirs)
    table = Table(box=None, pad_edge=False, show_header=False)
    if group is None:
        for name, names in choices.items():
            marked = [f"{choice} (default)" if choice == defaults.get(name) else choice for choice in names]
            table.add_row(Text(name, style="bold"), Text(", ".join(marked)))
    else:
        for name in choices[group]:
            file = find_file(dirs, f"{group}/{name}")
            default = " (default)" if name == defaults.get(group) else ""
            table.add_row(Text(f"{group}={name}", style="bold"), Text((describe_file(file) if file else "") + default))
    console.print(table)


def _default_choices(dirs: Sequence[Path]) -> dict[str, str]:
    entries = read_yaml(dirs[0] / "config.yaml")["defaults"]
    return {group: choice for entry in entries if isinstance(entry, dict) for group, choice in entry.items()}


def show(
    overrides: Sequence[str], *, config_dir: Path | None = None, changed: bool = False, console: Console | None = None
) -> None:
    """Print the configuration that these overrides compose to, as YAML.

    Args:
        changed: print instead only the keys that differ from a run without overrides, and what set each.

    Raises:
        ConfigError: the overrides are wrong.
    """
    console = console or make_console()
    composition = compose_with_sources(overrides, config_dir=config_dir)
    if not changed:
        text = yaml.safe_dump(plain(composition.config), sort_keys=False, allow_unicode=True)
        # no background and no padding, so that it can be copied; off a terminal it is plain YAML
        console.print(
            Syntax(text, "yaml", background_color="default") if console.is_terminal else Text(text), end="", soft_wrap=True
        )
        return
    table = Table(box=None, pad_edge=False)
    for column in ("key", "without", "with", "set by"):
        table.add_column(column)
    for key, before, after in diff(compose_with_sources([], config_dir=config_dir).config, composition.config):
        table.add_row(*map(Text, (key, _value(before), _value(after), source_of(key, composition.sources))))
    console.print(table)


def explain(
    key: str | None, overrides: Sequence[str] = (), *, config_dir: Path | None = None, console: Console | None = None
) -> None:
    """Print what a key does, its type, range and default, and what set its present value; without a key, list all keys.

    Args:
        key: a key, a group, or None.
        overrides: explain the values of a run with these overrides.

    Raises:
        ConfigError: there is no such key.
    """
    console = console or make_console()
    if key is None:
        table = Table(box=None, pad_edge=False, show_header=False)
        for path, known in all_keys().items():
            table.add_row(Text(path, style="bold"), Text(known.doc))
        console.print(table)
        return
    composition = compose_with_sources(overrides, config_dir=config_dir)
    for explanation in explaining.explain(key, composition):
        _print(console, explanation)


def _print(console: Console, explanation: Explanation) -> None:
    key = explanation.key
    console.print(Text(f"{explanation.path} = {_value(explanation.value)}", style="bold"))
    rows = [
        ("", key.doc),
        ("type", key.type_text),
        ("unit", key.unit),
        ("range", key.range_text),
        ("default", _value(key.default) if explanation.path == key.path else ""),
        ("reason", key.why),
        ("set by", explanation.source if explanation.source != DEFAULT_SOURCE else "nothing: this is the default"),
    ]
    for name, text in rows:
        if text:
            console.print(Text(f"  {name + ': ' if name else ''}{text}"), soft_wrap=True)


def _value(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
