"""What DeepSpeed loads when an engine is built, and how trainer/engine.py keeps it from compiling what nobody uses."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from helpers.fitting import fit_here
from helpers.ranks import run_ranks
from helpers.upstream import line, still

WORKAROUND = "trainer/engine.py: _import_muon_as_written"


def test_a_function_decorated_under_the_variable_stays_as_written(monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")

    def double(x):
        return 2 * x

    still(torch.compile(double) is double, "runtime/zero/utils.py:72", "import MuonWithAuxAdam", WORKAROUND)
    assert "@compiler.compile()" in line("runtime/zero/muon/original_muon.py:50")
    source = Path(torch.__file__).parent / "_dynamo" / "eval_frame.py"
    assert "TORCHDYNAMO_DISABLE" in source.read_text().splitlines()[1751]


def _loaded_by_training(run_dir: str, variable: str | None) -> tuple[bool, bool, str | None]:
    if variable is not None:
        os.environ["TORCHDYNAMO_DISABLE"] = variable
    fit_here(["train.max_steps=1"], run_dir)
    modules = ("deepspeed.runtime.zero.muon.original_muon", "torch._inductor.compile_fx")
    return modules[0] in sys.modules, modules[1] in sys.modules, os.environ.get("TORCHDYNAMO_DISABLE")


@pytest.mark.dist
@pytest.mark.parametrize("variable", [None, "0"])
def test_training_loads_no_compiler_and_leaves_the_variable_as_it_was(tmp_path, variable):
    (found,) = run_ranks(_loaded_by_training, 1, fresh=True, run_dir=str(tmp_path), variable=variable)
    assert found == (True, False, variable)
