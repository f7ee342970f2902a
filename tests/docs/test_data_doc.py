"""The example source of docs/data.md works as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from anyshard.configs import registry, schema
from anyshard.trainer.data.build import build_data

DOC = Path(__file__).parents[2] / "docs" / "data.md"


def test_example_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._REGISTERED, "data", {})
    (code,) = re.findall(r"```python\n(.*?)```", DOC.read_text(encoding="utf-8"), flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, str(DOC), "exec"), names)
    data = schema.Data(source="squares", options={"count": 500}, sequence_length=32, cache_dir=str(tmp_path))
    splits = build_data(data, seed=0, say=lambda line: None)
    assert splits.tokenizer.decode(splits.train[0]["input_ids"]).startswith("0 * 0 = 0")
    assert splits.validation is not None
    assert len(splits.train) > 100
