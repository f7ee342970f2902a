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
