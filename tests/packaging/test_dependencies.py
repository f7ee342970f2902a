"""What the sources import is what pyproject.toml asks for: an environment that has more hides what is missing."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections import defaultdict
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PARTS = ("configs", "parallel", "offload", "trainer", "launch")
THROUGH = {"yaml": "omegaconf", "omegaconf": "hydra-core", "huggingface_hub": "transformers", "click": "typer"}
"""Packages that come with one that is asked for, which would not work without them."""
OPTIONAL = {"datasets": "hf", "upath": "s3", "matplotlib": "plot", "submitit": "slurm"}
"""Extras: imported inside functions only."""


def _imports(tree: ast.AST, *, at_top: bool) -> set[str]:
    """Names of top-level packages that are imported anywhere, or only where importing the module imports them."""
    found = set()
    nodes = list(ast.iter_child_nodes(tree))
    for node in nodes:
        if at_top and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            nodes += node.orelse
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(str(node.module).partition(".")[0])
        nodes += ast.iter_child_nodes(node)
    return found


def third_party(*, at_top: bool) -> dict[str, list[str]]:
    """Third-party packages that the five directories import, and the files that do."""
    users = defaultdict(list)
    for part in ("anyshard/__init__.py", "anyshard/__main__.py", *PARTS):
        for path in [ROOT / part] if part.endswith(".py") else sorted((ROOT / part).rglob("*.py")):
            for name in _imports(ast.parse(path.read_text()), at_top=at_top) - sys.stdlib_module_names - {"anyshard"}:
                users[name].append(str(path.relative_to(ROOT)))
    return dict(users)


def _asked() -> tuple[set[str], dict[str, set[str]]]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    return _names(project["dependencies"]), {extra: _names(lines) for extra, lines in extras.items()}


def _names(lines: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in lines}


def _distributions(package: str) -> set[str]:
    return {canonicalize_name(name) for name in packages_distributions().get(package, [package])}


USERS = third_party(at_top=False)


@pytest.mark.parametrize("package", sorted(USERS))
def test_what_is_imported_is_asked_for(package: str) -> None:
    dependencies, extras = _asked()
    if package in OPTIONAL:
        assert _distributions(package) & extras[OPTIONAL[package]]
        assert package not in third_party(at_top=True), "an extra is imported where it is used, in a function"
        return
    wanted = {THROUGH[package]} if package in THROUGH else _distributions(package)
    while wanted & set(THROUGH):
        wanted = {THROUGH.get(name, name) for name in wanted}
    assert wanted & dependencies, f"{', '.join(USERS[package])} import {package}: pyproject.toml does not ask for it"


def test_what_is_asked_for_is_imported_or_needed_by_what_is() -> None:
    dependencies, extras = _asked()
    imported = {name for package in USERS for name in _distributions(package)}
    for_others = {"ninja", "setuptools", "packaging"}  # DeepSpeed builds its operators with them
    assert dependencies - imported - for_others == set()
    assert set(OPTIONAL.values()) == set(extras) - {"dev"}


def test_the_list_of_imports_sees_what_there_is() -> None:
    assert {"torch", "deepspeed", "transformers", "hydra", "typer", "rich", "numpy"} <= set(USERS)
    assert "torch" in third_party(at_top=True)
    head = ("import a.b", "from c import d", "if TYPE_CHECKING:", "    import e", "try:", "    import g", "finally:", "    f()")
    source = "\n".join([*head, "def f():", "    import h"])
    assert _imports(ast.parse(source), at_top=False) == {"a", "c", "g", "h"}
    assert _imports(ast.parse(source), at_top=True) == {"a", "c", "g"}
