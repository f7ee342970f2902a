"""The documentation is true: links lead somewhere, commands are commands, overrides compose, tables are those of the code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from anyshard.configs.compose import compose
from anyshard.configs.composes import axes_table, composition_table
from anyshard.launch.cli import app
from anyshard.launch.spec import REASONS

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
ids = [str(page.relative_to(ROOT)) for page in PAGES]


def commands(page: Path) -> list[list[str]]:
    """Every `anyshard ...` line of the page's bash blocks, and inline ones, split as a shell would."""
    text = page.read_text()
    blocks = "\n".join(re.findall(r"```(?:bash|sh|console)\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    lines = [line.removeprefix("$ ") for line in blocks.splitlines()]
    lines += re.findall(r"`(anyshard [^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    placeholders = re.compile(r"^anyshard -|[|]|\.\.\.|RUN |KEY|SOURCE")
    return [
        shlex.split(line, comments=True) for line in lines if line.startswith("anyshard ") and not placeholders.search(line)
    ]


def parse(words: list[str]):
    """The command that the words name, with its parameters; click complains about what it does not know."""
    command, context = get_command(app), None
    arguments = words[1:]
    while hasattr(command, "commands"):
        name = arguments[0]
        assert name in command.commands, f"{' '.join(words)}: there is no command {name}"
        command, arguments = command.commands[name], arguments[1:]
    context = command.make_context(words[0], arguments)
    return command.name, context.params


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target and not target.startswith("#"):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_commands_are_commands_and_their_overrides_compose(page):
    for words in commands(page):
        name, params = parse(words)
        if name in ("train", "plan") and not params.get("multirun") and not params.get("config_dir"):
            compose(params["overrides"] or [])


def test_the_readme_has_commands_to_check():
    assert len(commands(ROOT / "README.md")) >= 6


def between(marker: str) -> str:
    text = (ROOT / "README.md").read_text()
    return text.partition(f"<!-- {marker} -->\n")[2].partition(f"<!-- /{marker} -->")[0]


def test_the_table_of_what_composes_is_that_of_the_rules():
    assert between("composes") == composition_table(), "write it anew: python -m anyshard.configs.composes"
    assert between("axes") == axes_table(), "write it anew: python -m anyshard.configs.composes"


def test_the_transcript_ends_with_the_model_beating_unigrams():
    match = re.search(r"validation perplexity +([\d.]+) +\(a unigram model has ([\d.]+)\)", between("transcript"))
    assert match
    assert float(match[1]) < float(match[2]) / 2


def test_the_tree_of_the_readme_is_there():
    names = re.findall(r"^(\w+/)  ", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(names) >= 6
    assert all((ROOT / name).is_dir() for name in names)


def test_every_variable_that_is_set_is_explained():
    text = (ROOT / "docs/cluster.md").read_text()
    table = text.partition("<!-- variables -->")[2].partition("<!-- /variables -->")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == set(REASONS)
    for name, reason in REASONS.items():
        assert re.search(rf"^\| `{name}` \| .+ \| {re.escape(reason)} \|$", table, re.MULTILINE), name
