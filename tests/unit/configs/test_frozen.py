from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import yaml
from helpers.configs import make_config, set_key

from anyshard.configs.errors import ConfigError, EnvError
from anyshard.configs.frozen import (
    RESUMABLE_KEYS,
    after_restart,
    check_run_dir,
    checkpoint_dir_of,
    diff,
    environment,
    fingerprint,
    freeze,
    has_progress,
    is_resumable,
    load_frozen,
    run_dir_of,
)
from anyshard.configs.keys import all_keys
from anyshard.configs.schema import GROUPS


def test_what_is_frozen_is_read_back(tmp_path: Path) -> None:
    config = make_config({"optimizer.lr": 1e-5, "precision.dtype": "fp16", "callbacks": {"profiler": {"steps": [1, 2]}}})
    freeze(config, ["optimizer.lr=1e-5"], tmp_path / "run")
    assert load_frozen(tmp_path / "run") == config
    assert yaml.safe_load((tmp_path / "run/overrides.yaml").read_text()) == [{"overrides": ["optimizer.lr=1e-5"]}]
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == ["config.yaml", "overrides.yaml"]


def test_later_launches_are_recorded_with_what_they_changed(tmp_path: Path) -> None:
    freeze(make_config(), [], tmp_path)
    freeze(make_config({"zero.stage": 3}), ["zero=z3"], tmp_path)
    launches = yaml.safe_load((tmp_path / "overrides.yaml").read_text())
    assert launches[1] == {"overrides": ["zero=z3"], "changed": {"zero.stage": {"from": 1, "to": 3}}}


def test_freezing_the_same_again_changes_nothing(tmp_path: Path) -> None:
    freeze(make_config(), ["a=b"], tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    freeze(make_config(), [], tmp_path)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_directory_that_cannot_be_made_is_the_environments_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvError, match=r"run.dir=.*a file is in the way of this folder") as caught:
        freeze(make_config(), [], tmp_path / "file" / "run")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "it holds no config.yaml"),
        ("a: [", "config.yaml cannot be read"),
        ("- 1", "is not a configuration"),
        ("zero: {stge: 1}", "Did you mean zero.stage?"),
        ("zero: {stage: x}", "zero.stage=x"),
    ],
)
def test_a_run_directory_that_cannot_be_used(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_frozen(tmp_path)
    assert said in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_another_run_in_the_directory_is_refused_by_key(tmp_path: Path) -> None:
    freeze(make_config(), [], tmp_path)
    other = make_config({"seed": 7, "optimizer.lr": 1.0, "zero.stage": 3})
    check_run_dir(other, tmp_path)  # nothing was trained there: a failed start left it
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError) as caught:
        check_run_dir(other, tmp_path)
    assert "seed=42 (here 7); optimizer.lr=0.0003 (here 1.0)" in str(caught.value)
    assert "zero" not in str(caught.value)
    check_run_dir(other, tmp_path, force=True)


def test_the_same_run_under_another_layout_is_accepted(tmp_path: Path) -> None:
    check_run_dir(make_config(), tmp_path)  # nothing there yet
    freeze(make_config(), [], tmp_path)
    check_run_dir(make_config({"zero.stage": 3, "train.max_steps": 5, "checkpoint.keep": 1}), tmp_path)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_checkpoint_is_progress(tmp_path: Path, elsewhere: bool) -> None:
    folder = tmp_path / ("elsewhere" if elsewhere else "checkpoints")
    config = make_config({"checkpoint.dir": str(folder)} if elsewhere else {})
    (tmp_path / "metrics.jsonl").touch()
    assert not has_progress(tmp_path, config)
    (folder / "step-00000001").mkdir(parents=True)
    assert has_progress(tmp_path, config)


def test_every_resumable_key_exists() -> None:
    for name in RESUMABLE_KEYS:
        assert name in all_keys() or name in GROUPS, name


@pytest.mark.parametrize(
    "key", ["zero.stage", "run.dir", "checkpoint.every_steps", "stop.at_step", "callbacks.x.y", "train.max_steps"]
)
def test_resumable(key: str) -> None:
    assert is_resumable(key)


@pytest.mark.parametrize(
    "key", ["seed", "optimizer.lr", "train.global_batch_size", "model.config.x", "data.path", "precision.dtype"]
)
def test_not_resumable(key: str) -> None:
    assert not is_resumable(key)


@pytest.mark.parametrize(
    ("key", "value"),
    [("seed", 1), ("model.config", {"model_type": "gpt2"}), ("data.sequence_length", 8), ("precision.dtype", "fp32")],
)
def test_the_fingerprint_follows_the_mathematics(key: str, value: object) -> None:
    assert fingerprint(make_config({key: value})) != fingerprint(make_config())


@pytest.mark.parametrize(
    ("key", "value"), [("zero.stage", 3), ("run.dir", "/x"), ("launch.nodes", 2), ("tracking.name", "wandb")]
)
def test_the_fingerprint_ignores_the_layout(key: str, value: object) -> None:
    assert fingerprint(make_config({key: value})) == fingerprint(make_config())


def test_diff_sees_keys_of_either_side() -> None:
    a, b = make_config({"deepspeed_extra": {"x": 1}}), make_config({"deepspeed_extra": {"y": 2}})
    assert diff(a, b) == [("deepspeed_extra.x", 1, None), ("deepspeed_extra.y", None, 2)]
    assert diff(a, a) == []


def test_directories() -> None:
    config = make_config({"run.dir": "/runs/a"})
    assert checkpoint_dir_of(config) == Path("/runs/a/checkpoints")
    set_key(config, "checkpoint.dir", "/ck")
    assert checkpoint_dir_of(config) == Path("/ck")
    with pytest.raises(ConfigError, match="no run directory"):
        run_dir_of(make_config())


def test_environment_names_versions() -> None:
    packages = environment()["packages"]
    assert packages["hydra-core"]
    assert packages["deepspeed"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_configuration_is_told(tmp_path: Path) -> None:
    freeze(make_config(), [], tmp_path)
    (tmp_path / "config.yaml").chmod(0)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_frozen(tmp_path)


def test_ranks_that_are_started_again_go_on_from_what_this_launch_saved(tmp_path: Path) -> None:
    config = make_config({"resume": "never", "run.dir": str(tmp_path)})
    commit = tmp_path / "checkpoints/step-00000005/COMMIT"
    commit.parent.mkdir(parents=True)
    commit.touch()
    os.utime(commit, (1, 1))  # of an earlier launch
    freeze(config, [], tmp_path)
    assert after_restart(config, tmp_path).resume == "never"
    commit.touch()
    os.utime(commit, (time.time() + 1,) * 2)
    assert after_restart(config, tmp_path).resume == "auto"
    assert after_restart(make_config({"resume": "must"}), tmp_path).resume == "must"
