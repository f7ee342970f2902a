"""The commands of docs/interop.md run, in their order, and end with 0."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from helpers.cli import anyshard, happened, steps

DOC = Path(__file__).parents[2] / "docs" / "interop.md"


def commands() -> list[list[str]]:
    blocks = re.findall(r"<!-- run -->\n```bash\n(.*?)```\n<!-- /run -->", DOC.read_text(), re.DOTALL)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]


def test_every_command_is_there() -> None:
    named = {words[2] for words in commands() if words[1] == "ckpt"}
    assert named == {"export", "import", "diff", "convert", "prune"}


@pytest.mark.e2e
def test_the_commands_run(tmp_path: Path) -> None:
    for words in commands():
        assert words[0] == "anyshard"
        done = anyshard(*words[1:], cwd=tmp_path)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
    runs = tmp_path / "runs"
    assert steps(runs / "tuned")[0]["train/loss"] < steps(runs / "first")[0]["train/loss"] - 0.5  # trained weights came in
    assert [each["step"] for each in happened(runs / "tuned", "restore") + happened(runs / "on", "restore")] == [0, 20]
    assert steps(runs / "on")[-1]["step"] == 25
    assert len(list((tmp_path / "first-bf16").glob("model-*-of-*.safetensors"))) > 1
