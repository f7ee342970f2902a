"""Bad input, each with one clear error and nothing lost: what people see, what is left, and the exit code."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from helpers.cli import SMOKE, anyshard, environment, events, finish, happened, start, steps, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.sampled(14, of="bad input")]

ONE = ["debug=smoke", "launch.procs_per_node=1"]


@contextmanager
def small_disk(folder: Path, size: str, options: str = "") -> Iterator[Path]:
    """A file system of its own at `folder`, of this size."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}{options}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def refused(cwd: Path, *arguments: str, code: int = 2, command: str = "train") -> str:
    """Run a command that must be refused before anything is started or written; returns what it says."""
    before = sorted(str(path) for path in cwd.rglob("*"))
    done = anyshard(command, *arguments, cwd=cwd, timeout_s=60)
    assert done.returncode == code, done.stdout + done.stderr
    assert sorted(str(path) for path in cwd.rglob("*")) == before
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    first, *rest = done.stderr.splitlines()
    assert first.split(":")[0] in ("ConfigError", "DataError", "PlanError", "EnvError")
    assert (rest[-1:] == ["Nothing was started."]) == (code == 2)
    return done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with checkpoints of steps 4, 8 and 12. Copy it before changing it."""
    cwd = tmp_path_factory.mktemp("trained")
    done = anyshard("train", *SMOKE, "run.dir=run", "train.max_steps=12", "checkpoint.every_steps=4", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return cwd / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_misspelt_keys_and_choices_are_told_together(tmp_path):
    wrong = ["zeroo=z1", "train.max_step=3", "model=tyny", "optimizer.nmae=adam", "zero.stage=x", "precision=fp61"]
    said = refused(tmp_path, *SMOKE, *wrong)
    assert said.startswith("ConfigError: 6 problems:\n")
    for hint in ("Did you mean zero?", "train.max_steps?", "model=tiny?", "optimizer.name?", "zero.stage=x", "precision=fp16?"):
        assert hint in said


def test_numbers_that_do_not_fit_each_other(tmp_path):
    said = refused(tmp_path, *SMOKE, "train.global_batch_size=7")
    assert "train.global_batch_size=7: it is not a multiple of train.micro_batch_size * dp = 4 * 2 = 8" in said
    assert "Use train.global_batch_size=8." in said
    said = refused(tmp_path, *SMOKE, "parallel.dp=3", "train.global_batch_size=12")
    assert "parallel.dp=3: dp * tp * pp * sp = 3 * 1 * 1 * 1 = 3, but there are 2 ranks" in said
    assert "Set parallel.dp=2 or auto, or start launch.procs_per_node=3." in said
    assert "parallel.pp=5: the model tiny has 4 layers" in refused(tmp_path, *SMOKE, "parallel.pp=5", "launch.procs_per_node=5")


def test_a_model_too_small_for_the_data(tmp_path):
    said = refused(
        tmp_path, *SMOKE, "data.sequence_length=4096", "data.tokenizer=bpe", "data.bpe_vocab_size=512", "data=synthetic"
    )
    assert "data.sequence_length=4096: the model tiny has 2048 positions. Set it to at most 2048." in said
    assert "data.bpe_vocab_size=512: the tokenizer has 512 ids, the model tiny a vocabulary of 272. Set " in said


def test_a_model_by_path_too_small_for_the_data(tmp_path):
    from tokenizers import Tokenizer, models

    config = {"model_type": "gpt2", "n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 32, "vocab_size": 300}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(400)}, unk_token="w0"))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    said = refused(tmp_path, *SMOKE, "model=hf", "model.path=model")
    assert "data.sequence_length=64: " in said
    assert "32 positions" in said
    said = refused(
        tmp_path, *SMOKE, "model=hf", "model.path=model", "data.sequence_length=16", "data.tokenizer=./tokenizer.json"
    )
    assert f"data.tokenizer={tmp_path}/tokenizer.json: the tokenizer has 401 ids, the model " in said
    assert "vocabulary of 300" in said
    assert "model.config.vocab_size=401" in said


def test_data_that_cannot_be_used(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "lines.jsonl").write_text('{"body": "a"}\n')
    (tmp_path / "link.txt").symlink_to("nowhere")
    for path, reason in {
        "nothing": "there is no such file or folder.",
        "*.csv": "matches no file.",
        "empty.txt": "this file is empty.",
        "link.txt": "cannot be read (a dangling link).",
    }.items():
        said = refused(tmp_path, *ONE, "data=text", f"data.path={path}")
        assert f"data.path={tmp_path / path}: {reason}" in said
    assert "data.path=./nothing: there is no such" in refused(tmp_path, *ONE, "data=hf", "data.path=./nothing")
    said = refused(tmp_path, *ONE, "data=text", "data.path=lines.jsonl")
    assert f"data.field=text: {tmp_path}/lines.jsonl, line 1: this field is missing. Set data.field to one of body." in said


def test_a_line_without_the_field_is_found_by_the_ranks_and_the_directory_can_be_used_again(tmp_path):
    lines = [json.dumps({"text": "some words of a text " * 40}) for _ in range(40)]
    (tmp_path / "lines.jsonl").write_text("\n".join([*lines, '{"body": "a"}']))
    arguments = ["train", *SMOKE, "data=text", "run.dir=run", "train.max_steps=2", f"data.cache_dir={tmp_path}/cache"]
    done = anyshard(*arguments, "data.path=lines.jsonl", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"DataError: data.field=text: {tmp_path}/lines.jsonl, line 41: this field is missing.")
    assert "Nothing was trained." in done.stderr
    (tmp_path / "good.jsonl").write_text("\n".join(lines))
    done = anyshard(*arguments, "data.path=good.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (tmp_path / "good.jsonl").unlink()
    said = refused(tmp_path, "run", "train.max_steps=3", command="resume")
    assert f"data.path={tmp_path}/good.jsonl: there is no such file or folder." in said


def test_a_run_directory_of_another_run_and_none_at_all(run):
    said = refused(run.parent, *SMOKE, "run.dir=run", "seed=7", "train.max_steps=12")
    assert f"run.dir={run}: it holds a run with seed=42 (here 7)." in said
    assert "Choose another run.dir" in said
    said = refused(run.parent, "nowhere", command="resume")
    assert "run directory=nowhere: there is no such folder." in said
    said = refused(run.parent, "run", "optimizer.weight_decay=0.3", "seed=7", command="resume")
    assert "optimizer.weight_decay=0.3: the run was started with 0.1, and this would change its mathematics." in said
    assert "seed=7" in said
    assert "--force" in said


def test_force_changes_the_mathematics_and_is_recorded(run):
    done = anyshard("resume", "run", "optimizer.weight_decay=0.3", "train.max_steps=14", "--force", cwd=run.parent)
    assert done.returncode == 0, done.stderr
    assert "optimizer.weight_decay is now 0.3, was 0.1" in done.stdout
    launches = yaml.safe_load((run / "overrides.yaml").read_text())
    assert launches[-1]["changed"]["optimizer.weight_decay"] == {"from": 0.1, "to": 0.3}
    groups = json.loads(anyshard("ckpt", "show", "run", "--json", cwd=run.parent).stdout)["groups"]
    assert groups["decay"]["weight_decay"] == 0.3
    assert groups["no_decay"]["weight_decay"] == 0


def test_checkpoints_that_are_not_there(run, tmp_path):
    said = refused(tmp_path, *SMOKE, "run.dir=new", "resume=must")
    assert f"resume=must: there is no checkpoint in {tmp_path}/new/checkpoints." in said
    said = refused(tmp_path, *SMOKE, "run.dir=new", "resume=nowhere")
    assert f"resume={tmp_path}/nowhere: there is no such directory." in said
    (tmp_path / "folder").mkdir()
    said = refused(tmp_path, *SMOKE, "run.dir=new", "resume=folder")
    assert f"resume={tmp_path}/folder: no sound checkpoint is there." in said


def test_a_checkpoint_of_another_model(run, tmp_path):
    arguments = ["run.dir=other", "resume=run", "model.config.hidden_size=128"]
    done = anyshard("train", *SMOKE, *arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("CheckpointError: ")
    assert "of another model: its model.embed_tokens.weight has shape (272, 64), this model's has (272, 128)." in done.stderr
    assert "Nothing was trained." in done.stderr


def test_damaged_checkpoints_are_passed_over_or_refused(run):
    """A flipped bit in the newest, a cut-off file in the one before."""
    checkpoints = run / "checkpoints"
    flipped, cut = checkpoints / "step-00000012" / "rank-00001.bin", checkpoints / "step-00000008" / "rank-00000.bin"
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 4
    flipped.write_bytes(content)
    os.truncate(cut, cut.stat().st_size - 100)

    done = anyshard("resume", "run", "resume=must", "train.max_steps=13", cwd=run.parent)
    assert done.returncode == 1
    assert done.stderr.startswith(f"CheckpointError: The checkpoint {flipped.parent} is damaged: rank-00001.bin, bytes ")
    assert "checksum mismatch" in done.stderr
    assert f"The last good checkpoint is {checkpoints}/step-00000004." in done.stderr
    assert f"anyshard resume {run} resume=auto" in done.stderr
    assert steps(run)[-1]["step"] == 12

    done = anyshard("resume", "run", "resume=auto", "train.max_steps=13", cwd=run.parent)
    assert done.returncode == 0, done.stderr
    assert f"the checkpoint {flipped.parent} is damaged and is passed over" in done.stdout
    assert f"the checkpoint {cut.parent} is damaged and is passed over" in done.stdout
    assert f"resumed from {checkpoints}/step-00000004 at step 4" in done.stdout
    assert [Path(event["path"]) for event in happened(run, "checkpoint_damaged")[-2:]] == [flipped.parent, cut.parent]


def test_a_full_disk_under_the_checkpoints(tmp_path):
    """Room for one checkpoint: the second fails and training goes on, the last fails and ends the run."""
    with small_disk(tmp_path / "small", "3m") as disk:
        done = anyshard(
            "train",
            *SMOKE,
            "run.dir=run",
            "checkpoint.dir=small/ck",
            "train.max_steps=12",
            "checkpoint.every_steps=4",
            cwd=tmp_path,
        )
        assert done.returncode == 3, done.stderr
        assert f"WARNING: step 8 was not saved: {disk}/ck/step-00000008/rank-00000.bin: No space left on device" in done.stdout
        assert "Training goes on." in done.stdout
        assert "step 12/12" in done.stdout
        assert done.stderr.startswith("DiskFullError: step 12 was not saved: ")
        assert "bytes, " in done.stderr
        assert "are free" in done.stderr
        assert "set checkpoint.dir to a folder on another" in done.stderr
        assert f"The last good checkpoint is {disk}/ck/step-00000004." in done.stderr
        assert sorted(path.name for path in (disk / "ck").iterdir()) == ["latest", "step-00000004"]
        assert anyshard("ckpt", "verify", str(disk / "ck" / "step-00000004"), cwd=tmp_path).returncode == 0


def test_a_full_disk_under_the_run_directory(tmp_path):
    """Full from the start, and full while training."""
    with small_disk(tmp_path / "small", "8k") as disk:
        done = anyshard("train", *SMOKE, "run.dir=small/run", cwd=tmp_path)
        assert done.returncode == 3
        assert done.stderr.startswith(f"EnvError: run.dir={disk}/run: the disk is full. Free some space")
        assert "Traceback" not in done.stderr
    # 4 KiB blocks for each of the frozen files and logs, and next to nothing for the rest
    with small_disk(tmp_path / "small", "64k") as disk:
        done = anyshard("train", *SMOKE, "run.dir=small/run", "train.log_every_steps=1", "train.max_steps=200", cwd=tmp_path)
        assert done.returncode == 3, done.stderr
        assert "metrics.jsonl cannot be written (No space left on device): lines are lost, training goes on" in done.stdout
        assert "step 200/200" in done.stdout
        assert done.stderr.startswith("DiskFullError: step 200 was not saved: ")
        assert all(json.loads(line) for line in (disk / "run" / "metrics.jsonl").read_text().splitlines())


def test_folders_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    said = refused(tmp_path, *ONE, "run.dir=file", code=3)
    assert f"run.dir={tmp_path}/file: a file is in the way of this folder." in said
    said = refused(tmp_path, *ONE, "run.dir=run", "checkpoint.dir=file/sub", code=3)
    assert f"checkpoint.dir={tmp_path}/file/sub: a file is in the way of this folder." in said
    said = refused(tmp_path, *ONE, "run.dir=run", "data.cache_dir=file", code=3)
    assert f"data.cache_dir={tmp_path}/file: a file is in the way of this folder." in said
    with small_disk(tmp_path / "fixed", "8k", ",ro"):
        said = refused(tmp_path, *ONE, "run.dir=fixed/run", code=3)
        assert f"run.dir={tmp_path}/fixed/run: it cannot be written (Read-only file system)." in said


def test_a_port_in_use(tmp_path):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        said = refused(tmp_path, *ONE, f"launch.port={port}", code=3)
    assert f"launch.port={port}: something listens on this port already." in said


def by_hand(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "anyshard.trainer.run", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment(**env), capture_output=True, text=True, timeout=120, check=False)


def test_ranks_started_by_hand_that_cannot_meet(tmp_path):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = str(sock.getsockname()[1])
        ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        done = by_hand(*SMOKE, "run.dir=run", cwd=tmp_path, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **ranks)
    assert done.returncode == 3
    assert f"the ranks could not meet at 127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_run_directory_by_hand_takes_no_overrides(tmp_path):
    done = by_hand("--run-dir", "run", "seed=2", cwd=tmp_path)
    assert done.returncode == 2
    assert "--run-dir takes one folder and nothing else" in done.stderr


def test_a_run_directory_with_a_live_run(tmp_path):
    process = start("train", *ONE, "run.dir=run", "train.max_steps=100000", cwd=tmp_path)
    wait_for(lambda: steps(tmp_path / "run"), process)
    said = refused(tmp_path, *ONE, "run.dir=run", "train.max_steps=100000", code=3)
    assert f"run.dir={tmp_path}/run: a run is alive in it (process " in said
    again = by_hand("--run-dir", "run", cwd=tmp_path)
    assert again.returncode == 3
    assert "a run is alive in it" in again.stderr
    assert anyshard("runs", "stop", "run", cwd=tmp_path).returncode == 0
    assert finish(process)[0] == 75


@pytest.mark.parametrize(("zero", "said"), [("z0", "the loss is nan at step"), ("z1", "the gradients are not finite")])
def test_a_loss_or_gradients_that_are_not_finite(tmp_path, zero, said):
    """Above ZeRO 0 DeepSpeed drops such steps without end, and the loss stays what it was."""
    run = tmp_path / "run"
    arguments = ["optimizer.lr=1e30", "schedule=constant", "schedule.warmup_steps=3", "train.log_every_steps=1"]
    done = anyshard("train", *SMOKE, f"zero={zero}", "run.dir=run", "checkpoint.every_steps=1", *arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("TrainError: ")
    assert said in done.stderr
    assert f"The last good checkpoint is {run}/checkpoints/step-0000000" in done.stderr
    assert [event["event"] for event in events(run)][-1] == "nan"
