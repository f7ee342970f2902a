from __future__ import annotations

from pathlib import Path

import pytest

from anyshard.configs.compose import compose
from anyshard.configs.errors import ConfigError
from anyshard.configs.frozen import diff, freeze, load_frozen
from anyshard.configs.resume import override_frozen
from anyshard.configs.schema import Device
from anyshard.configs.world import resolve_world


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    config = resolve_world(compose(["debug=smoke", f"run.dir={tmp_path}", "launch.procs_per_node=2", "resume=never"]), 0)
    freeze(config, ["debug=smoke"], tmp_path)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    return tmp_path


def test_layout_lengths_and_intervals_may_change(run_dir: Path) -> None:
    config = override_frozen(run_dir, ["zero=z3", "offload=cpu_param", "train.max_steps=99", "launch.procs_per_node=4"])
    assert (config.zero.stage, config.offload.param, config.train.max_steps) == (3, Device.cpu, 99)
    assert resolve_world(config, 0).parallel.dp == 4


def test_without_overrides_only_what_is_derived_changes(run_dir: Path) -> None:
    frozen = compose(["debug=smoke", f"run.dir={run_dir}", "launch.procs_per_node=2"])
    assert diff(frozen, override_frozen(run_dir, [])) == []


def test_a_run_that_was_moved_keeps_its_directory(run_dir: Path, tmp_path: Path) -> None:
    moved = tmp_path.parent / f"{tmp_path.name}-moved"
    run_dir.rename(moved)
    assert override_frozen(moved, []).run.dir == str(moved)


def test_a_resumed_run_continues_unless_told_otherwise(run_dir: Path) -> None:
    assert override_frozen(run_dir, []).resume == "auto"
    assert override_frozen(run_dir, ["resume=must"]).resume == "must"


def test_another_cluster_has_its_own_number_of_ranks(run_dir: Path) -> None:
    config = resolve_world(override_frozen(run_dir, ["cluster=8xh100"]), 0)
    assert (config.cluster.name, config.parallel.dp) == ("8xh100", 8)


def test_mathematics_may_not_change(run_dir: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        override_frozen(run_dir, ["seed=7", "optimizer.betas=[0.8,0.9]"])
    assert [problem.key for problem in caught.value.problems] == ["seed", "optimizer.betas"]
    assert "the run was started with 42" in str(caught.value)
    assert "--force" in str(caught.value)


def test_mathematics_may_change_while_nothing_is_trained(run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").unlink()
    assert override_frozen(run_dir, ["seed=7"]).seed == 7


def test_paths_are_made_absolute(run_dir: Path) -> None:
    config = override_frozen(run_dir, ["resume=other/run", "checkpoint.dir=ck"])
    assert (config.resume, config.checkpoint.dir) == (str(Path.cwd() / "other/run"), str(Path.cwd() / "ck"))


def test_mathematics_may_change_by_force(run_dir: Path) -> None:
    assert override_frozen(run_dir, ["seed=7"], force=True).seed == 7


def test_wrong_overrides_are_told_together(run_dir: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        override_frozen(run_dir, ["zero=z9", "sed=7", "experiment=cpu_quickstart", "train.max_steps=x"])
    assert sorted(problem.key for problem in caught.value.problems) == ["experiment", "sed", "train.max_steps", "zero"]


def test_files_of_ones_own(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("configs")
    (folder / "zero").mkdir()
    (folder / "zero/mine.yaml").write_text("stage: 2\n")
    assert override_frozen(run_dir, ["zero=mine"], config_dir=folder).zero.stage == 2


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"it holds no config.yaml"):
        override_frozen(tmp_path, [])


def test_the_stop_of_an_earlier_launch_does_not_stop_the_next(run_dir: Path) -> None:
    config = load_frozen(run_dir)
    config.stop.at_step = 5
    freeze(config, [], run_dir)
    assert override_frozen(run_dir, []).stop.at_step is None
    assert override_frozen(run_dir, ["stop.at_step=9"]).stop.at_step == 9
