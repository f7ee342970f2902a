"""Every cell of ZeRO stage x offload x precision: DeepSpeed's configuration where it is legal, the error where it is not."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from helpers.golden import compare

from anyshard.configs.batch import plan_batch
from anyshard.configs.compose import compose
from anyshard.configs.errors import ConfigError
from anyshard.configs.rules import require
from anyshard.configs.schema import Config
from anyshard.configs.sources import OURS, group_choices
from anyshard.configs.world import resolve_ranks
from anyshard.trainer.ds_config import compile_ds_config

FOLDER = Path(__file__).parent / "ds_config"
CHOICES = group_choices([OURS])
OFFLOADS = [name for name in CHOICES["offload"] if name != "auto"]  # one of the others, by the time that this is made
CELLS = list(itertools.product(CHOICES["zero"], OFFLOADS, CHOICES["precision"]))


def _config(zero: str, offload: str, precision: str) -> Config:
    config = compose(
        [f"zero={zero}", f"offload={offload}", f"precision={precision}", "model=tiny", "offload.nvme_path=/mnt/nvme"]
    )
    return resolve_ranks(config, nodes=1, procs_per_node=2)


@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_cell(cell: tuple[str, str, str], pytestconfig: pytest.Config) -> None:
    name = "-".join(cell)
    config = _config(*cell)
    try:
        require(config)
    except ConfigError as error:
        compare(FOLDER / f"{name}.error.txt", f"{error}\n", pytestconfig)
        return
    compiled = compile_ds_config(config, plan_batch(config.train, dp=2))
    compare(FOLDER / f"{name}.json", json.dumps(compiled, indent=2) + "\n", pytestconfig)


def test_there_is_one_file_for_each_cell() -> None:
    assert sorted(file.name.partition(".")[0] for file in FOLDER.iterdir()) == sorted("-".join(cell) for cell in CELLS)
