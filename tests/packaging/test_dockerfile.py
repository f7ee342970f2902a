"""The Dockerfile without an engine: linted, and each of its steps is one that this checkout can do."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "Dockerfile").read_text()
STEP = re.compile(r"^(ARG|FROM|RUN|COPY|ENV|WORKDIR|ENTRYPOINT) (.*)", re.DOTALL)


def steps() -> list[tuple[str, str]]:
    """Instructions with their arguments, continued lines joined."""
    lines = [line for line in TEXT.splitlines() if line.strip() and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    found = []
    for line in joined.splitlines():
        match = STEP.match(line)
        assert match, line
        found.append((match[1], " ".join(match[2].split())))
    return found


def targets() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each target."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name, rest in steps():
        if name == "FROM":
            found[rest.split(" AS ")[1]] = own = []
        elif name != "ARG":
            own.append((name, rest))
    return found


def test_two_targets_that_end_in_doctor():
    assert list(targets()) == ["cpu", "cuda"]
    for own in targets().values():
        runs = [rest for name, rest in own if name == "RUN"]
        assert runs[-1].endswith("anyshard doctor")
        assert own[-1] == ("ENTRYPOINT", '["anyshard"]')


def test_base_images_are_pinned_to_a_version():
    images = dict(rest.split("=") for name, rest in steps() if name == "ARG")
    used = [rest.split()[0] for name, rest in steps() if name == "FROM"]
    assert used == [f"${{{name}}}" for name in images]
    for image in images.values():
        assert re.fullmatch(r"[a-z/]+:\d+\.\d+\.\d+-[a-z0-9.-]+", image), image


def test_lists_of_packages_are_removed_in_the_layer_that_made_them():
    for name, rest in steps():
        if name == "RUN" and "apt-get" in rest:
            assert rest.startswith("apt-get update && apt-get install --yes --no-install-recommends ")
            assert rest.endswith("rm -rf /var/lib/apt/lists/*")


def test_what_is_made_here_stays_out_of_the_image():
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "runs"} <= set(ignored)


def test_its_commands_are_shell():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    script = "\n".join(rest for name, rest in steps() if name == "RUN")
    done = subprocess.run(["shellcheck", "--shell=sh", "-"], input=script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_its_steps_are_those_of_this_checkout():
    """`make setup` is tested in a plain environment by test_setup.py; what is left is the end."""
    assert (ROOT / "tools" / "setup.py").exists()
    anyshard = Path(sys.executable).with_name("anyshard")
    done = subprocess.run([anyshard, "doctor"], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
