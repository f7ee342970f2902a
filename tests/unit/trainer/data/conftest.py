"""Data configurations whose cache is in the test's own folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anyshard.configs import schema


@pytest.fixture
def make_data(tmp_path: Path) -> Callable[..., schema.Data]:
    def make(**keys: Any) -> schema.Data:
        return schema.Data(**{"cache_dir": str(tmp_path / "cache"), **keys})

    return make


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder of six small texts and a file that is none."""
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    for number in range(5):
        words = " ".join(f"word{number}{i}" for i in range(200))
        (folder / f"{number}.txt").write_text(f"Text {number}.\n{words}\n", encoding="utf-8")
    (folder / "sub" / "notes.md").write_text("# Notes\nsome notes\n", encoding="utf-8")
    (folder / "image.png").write_bytes(b"\x89PNG\0\0")
    return folder
