"""docs/models.md lists every preset with its true size and shape."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

import anyshard.configs
from anyshard.configs import schema
from anyshard.trainer.models.hf import build
from anyshard.trainer.models.table import table_of

FOLDER = Path(anyshard.configs.__file__).resolve().parent / "model"
DOC = Path(__file__).parents[2] / "docs" / "models.md"
PRESETS = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "hf")
ROWS = {
    line.split("`")[1]: [cell.strip() for cell in line.split("|")[1:-1]]
    for line in DOC.read_text().splitlines()
    if line[:3] == "| `"
}


def test_every_preset_has_a_row() -> None:
    assert set(ROWS) == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_row_says_what_the_preset_is(name: str) -> None:
    raw = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    config = schema.Config(model=schema.Model(**raw))
    table = table_of(build(config, device=torch.device("meta"), dtype=torch.float32))
    assert ROWS[name][1:6] == [
        f"{table.num_params:,}",
        f"{table.num_layers} × {table.hidden_size}",
        f"{table.num_heads} ({table.num_kv_heads})",
        f"{table.vocab_size:,}",
        f"{table.max_positions:,}",
    ]
