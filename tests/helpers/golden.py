"""Golden files: what is written there was looked at by a person; `pytest --update-golden` writes it anew."""

from __future__ import annotations

from pathlib import Path

import pytest


def compare(file: Path, text: str, config: pytest.Config) -> None:
    """Compare with the golden file, or write it when asked to."""
    if config.getoption("--update-golden"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    wanted = file.read_text(encoding="utf-8") if file.is_file() else ""
    assert text == wanted, f"{file} differs; look at the difference, then run pytest with --update-golden"
