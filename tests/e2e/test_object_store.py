"""A run whose checkpoints are in an object store: saved in the background, found again, and looked at by the commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.cli import SMOKE, anyshard, happened
from helpers.s3 import BUCKET, s3_server

pytestmark = pytest.mark.e2e

URL = f"s3://{BUCKET}/runs/one"


def test_train_resume_and_look(tmp_path: Path) -> None:
    with s3_server() as env:
        options = ["run.dir=run", f"checkpoint.dir={URL}", "checkpoint.keep=2", "train.max_steps=8", "checkpoint.every_steps=2"]
        done = anyshard("train", *SMOKE, *options, "stop.at_step=5", cwd=tmp_path, env=env)
        assert done.returncode == 75, done.stderr
        assert f"The last good checkpoint is {URL}/step-00000005" in done.stderr
        done = anyshard("resume", "run", "launch.procs_per_node=1", "zero=z3", "stop.at_step=null", cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stderr
        assert happened(tmp_path / "run", "restore")[0]["path"] == f"{URL}/step-00000005"
        assert not (tmp_path / "run" / "checkpoints").exists()

        for what in ("run", URL):
            rows = json.loads(anyshard("ckpt", "ls", what, "--json", cwd=tmp_path, env=env).stdout)
            assert [row["path"] for row in rows] == [f"{URL}/step-{step:08d}" for step in (8, 6)]
            assert [row["problem"] for row in rows] == [None, None]
        shown = json.loads(anyshard("ckpt", "show", f"{URL}/step-00000006", "--json", cwd=tmp_path, env=env).stdout)
        assert shown["step"] == 6
        done = anyshard("ckpt", "verify", URL, cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stderr
        assert "every byte is as it was written" in done.stdout
        done = anyshard("ckpt", "export", URL, "hf", cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "hf" / "model.safetensors").exists()
        done = anyshard("ckpt", "prune", URL, "--keep", "1", cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stderr
        rows = json.loads(anyshard("ckpt", "ls", URL, "--json", cwd=tmp_path, env=env).stdout)
        assert [row["step"] for row in rows] == [8]
        done = anyshard("ckpt", "ls", f"s3://{BUCKET}-of-nobody/x", cwd=tmp_path, env=env)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr


def test_a_store_that_does_not_answer_is_said(tmp_path: Path) -> None:
    env = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    done = anyshard("ckpt", "show", URL, cwd=tmp_path, env={**env, "AWS_MAX_ATTEMPTS": "1"})
    assert done.returncode in (1, 3)
    assert "Traceback" not in done.stderr
    assert "127.0.0.1:9" in done.stderr
