"""`anyshard ckpt export|import|convert|diff|prune` on a run, as a person types them."""

from __future__ import annotations

import json

import pytest
from helpers.cli import SMOKE, anyshard, happened, steps

pytestmark = pytest.mark.e2e


def test_out_and_in_again(tmp_path):
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

    command("ckpt", "import", "hf", "weights")
    assert command("ckpt", "verify", "weights")
    resumed = command("train", *SMOKE, "launch.procs_per_node=1", "run.dir=tuned", "resume=weights", "train.max_steps=3")
    assert f"resumed from {tmp_path}/weights at step 0" in resumed
    assert steps(tmp_path / "tuned")[0]["train/loss"] < steps(tmp_path / "run")[0]["train/loss"] - 0.5

    command("ckpt", "export", checkpoint, "universal", "--to", "universal")
    command("ckpt", "import", "universal", "in")
    resumed = command("train", *SMOKE, "zero=z3", "run.dir=on", "resume=in", "train.max_steps=22")
    assert f"resumed from {tmp_path}/in at step 20" in resumed
    assert happened(tmp_path / "on", "restore")[0]["step"] == 20
    assert steps(tmp_path / "on")[-1]["step"] == 22

    command("ckpt", "convert", checkpoint, "one", "--files", "1")
    assert json.loads(command("ckpt", "diff", "run", "one", "--json"))["differences"] == []
    assert "differences" in command("ckpt", "diff", "run/checkpoints/step-00000010", "run", code=1)

    command("ckpt", "prune", "run", "--keep", "1")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-00000020"]
    assert "there is no checkpoint here" in command("ckpt", "import", "run/logs", "x", code=1)
