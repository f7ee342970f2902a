"""`anyshard ckpt export|import|diff|prune` on a run, and how they end; tests/docs/test_interop_doc.py has what succeeds."""

from __future__ import annotations

import json

import pytest
from helpers.cli import SMOKE, anyshard

pytestmark = pytest.mark.e2e


def test_results_and_exit_codes(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def command(*arguments, code=0):
        done = anyshard(*arguments, cwd=tmp_path)
        assert done.returncode == code, (arguments, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        return done.stdout if code == 0 else done.stderr or done.stdout

    command("train", *SMOKE, "run.dir=run", "checkpoint.every_steps=10")
    checkpoint = "run/checkpoints/step-00000020"

    told = json.loads(command("ckpt", "export", "run", "hf", "--json"))
    assert (told["step"], told["dtype"], told["notes"]) == (20, "float32", [])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = tokenizer("def f(x):", return_tensors="pt").input_ids
    assert ids.tolist() == [list(b"def f(x):")]
    assert torch.isfinite(model(ids).logits).all()
    assert "the same" in command("ckpt", "diff", checkpoint, "hf", "--weights")
    assert "not empty" in command("ckpt", "export", "run", "hf", code=2)

    assert "differences" in command("ckpt", "diff", "run/checkpoints/step-00000010", "run", code=1)

    command("ckpt", "prune", "run", "--keep", "1")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-00000020"]
    assert "there is no checkpoint here" in command("ckpt", "import", "run/logs", "x", code=1)


def test_checkpoints_outside_the_run_are_found_through_it(tmp_path):
    """`checkpoint.dir` is followed by everything that takes a run."""
    assert anyshard("train", *SMOKE, "run.dir=run", "checkpoint.dir=big/ck", cwd=tmp_path).returncode == 0
    assert not (tmp_path / "run" / "checkpoints").exists()
    (row,) = json.loads(anyshard("runs", "ls", ".", "--json", cwd=tmp_path).stdout)
    assert row["checkpoint"] == "step-00000020"
    rows = json.loads(anyshard("ckpt", "ls", "run", "--json", cwd=tmp_path).stdout)
    assert [row["path"] for row in rows] == [f"{tmp_path}/big/ck/step-000000{step}" for step in (20, 10)]
    for command in (["show", "run"], ["verify", "run"], ["export", "run", "hf"], ["prune", "run", "--keep", "1"]):
        done = anyshard("ckpt", *command, cwd=tmp_path)
        assert done.returncode == 0, (command, done.stderr)
    assert (tmp_path / "hf" / "tokenizer.json").exists()
    assert "the same" in anyshard("ckpt", "diff", "run", "hf", "--weights", cwd=tmp_path).stdout
