from __future__ import annotations

import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from anyshard.configs.compose import Composition, compose, compose_with_sources, finalize, split_arguments, sweep
from anyshard.configs.errors import ConfigError
from anyshard.configs.keys import plain
from anyshard.configs.rules import check
from anyshard.configs.schema import Config, Device, Dtype
from anyshard.configs.sources import OURS, group_choices
from anyshard.configs.world import resolve_world

EXPERIMENTS = group_choices([OURS])["experiment"]


def _folder(tmp_path: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path


def _error(overrides: list[str], folder: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(overrides, config_dir=folder)
    return str(caught.value)


def test_the_defaults_are_a_run_that_passes_the_rules() -> None:
    config = resolve_world(compose(), devices_found=0)
    assert check(config) == []
    assert (config.model.name, config.data.name, config.zero.stage) == ("llama_15m", "python_stdlib", 1)


def test_groups_keys_and_open_mappings() -> None:
    config = compose(["zero=z3", "offload=cpu_param", "precision=fp32", "train.max_steps=7", "deepspeed_extra.timers.x=1"])
    assert (config.zero.stage, config.offload.param, config.precision.dtype) == (3, Device.cpu, Dtype.fp32)
    assert config.train.max_steps == 7
    assert config.deepspeed_extra == {"timers": {"x": 1}}


def test_what_is_composed_holds_nothing_of_hydra() -> None:
    config = compose(["callbacks.profiler={steps: [1, 2]}"])
    assert type(config.callbacks["profiler"]) is dict
    assert type(config.callbacks["profiler"]["steps"]) is list
    assert type(config) is Config


@pytest.mark.parametrize(
    "group", ["parallel", "zero", "offload", "precision", "optimizer", "schedule", "checkpoint", "tracking"]
)
def test_every_file_of_a_group_composes(group: str) -> None:
    for name in group_choices([OURS])[group]:
        compose([f"{group}={name}"])


@pytest.mark.parametrize("name", group_choices([OURS])["cluster"])
def test_a_cluster_says_what_is_there(name: str) -> None:
    config = compose([f"cluster={name}"])
    assert config.cluster.name == name
    if name.endswith("h100"):
        assert config.launch.nodes * (config.cluster.devices_per_node or 0) == int(name.partition("x")[0])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_passes_the_rules(name: str) -> None:
    config = resolve_world(compose([f"experiment={name}"]), devices_found=0)
    assert check(config) == []
    devices = name.rpartition("_")[2]
    if "x" in devices:
        assert config.parallel.dp == int(devices.partition("x")[0])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_choices_on_the_command_line_win_over_an_experiment(name: str) -> None:
    config = compose([f"experiment={name}", "zero=z2", "offload=cpu", "precision=fp16", "optimizer=lion"])
    assert (config.zero.stage, config.offload.optimizer, config.precision.dtype) == (2, Device.cpu, Dtype.fp16)
    assert config.optimizer.name == "lion"


def test_debug_wins_over_an_experiment() -> None:
    config = compose(["experiment=llama3_8b_8xh100", "debug=smoke"])
    assert (config.model.name, config.train.max_steps) == ("tiny", 20)


def test_smoke_is_small() -> None:
    config = resolve_world(compose(["debug=smoke"]), devices_found=0)
    assert check(config) == []
    assert (config.model.name, config.data.source) == ("tiny", "synthetic")


def test_all_problems_of_overrides_and_types_come_together() -> None:
    text = _error(["zero=3", "sed=1", "train.max_steps=many", "precision.dtype=bf17"])
    assert text.startswith("4 problems:")
    assert "Did you mean zero=z3?" in text
    assert "train.max_steps=many: it is a string" in text


def test_an_unknown_key_in_a_file_names_the_file(tmp_path: Path) -> None:
    folder = _folder(tmp_path, {"zero/mine.yaml": "stage: 3\nstge: 4\n"})
    text = _error(["zero=mine"], folder)
    assert "zero.stge=4: there is no such key. Did you mean zero.stage?" in text
    assert f"(Set in {folder / 'zero/mine.yaml'}.)" in text


def test_a_choice_written_as_a_value_in_a_file_says_how_to_choose(tmp_path: Path) -> None:
    folder = _folder(tmp_path, {"experiment/mine.yaml": "# @package _global_\nzero: z3\n"})
    text = _error(["experiment=mine"], folder)
    assert "override /zero" in text
    assert "mine.yaml" in text


def test_a_file_that_a_defaults_list_names_and_nobody_has(tmp_path: Path) -> None:
    folder = _folder(tmp_path, {"experiment/mine.yaml": "# @package _global_\ndefaults:\n  - override /zero: z4\n"})
    text = _error(["experiment=mine"], folder)
    assert "zero=z4: there is no such file. In 'config': Could not find 'zero/z4'. There are: z0, z1, z2, z3." in text


def test_yaml_that_is_not_yaml_names_file_and_line(tmp_path: Path) -> None:
    folder = _folder(tmp_path, {"zero/mine.yaml": "stage: 3\n  overlap_comm: [\n"})
    assert "zero/mine.yaml:2" in _error(["zero=mine"], folder)


def test_an_interpolation_that_leads_nowhere_names_the_key() -> None:
    text = _error(["run.name='${nothing.there}'"])
    assert "run.name=null" in text
    assert "nothing.there" in text


def test_the_last_of_two_overrides_wins() -> None:
    assert compose(["zero=z1", "zero=z2", "seed=1", "seed=2"]).zero.stage == 2
    assert compose(["seed=1", "seed=2"]).seed == 2


def test_sources_say_which_file_or_override_set_a_key(tmp_path: Path) -> None:
    folder = _folder(tmp_path, {"experiment/mine.yaml": "# @package _global_\nseed: 3\ntrain: {max_steps: 5}\n"})
    sources = compose_with_sources(["experiment=mine", "train.max_steps=6", "~train.eval_samples"], config_dir=folder).sources
    assert sources["zero.stage"] == "configs/zero/z1.yaml"
    assert sources["seed"] == str(folder / "experiment/mine.yaml")
    assert sources["train.max_steps"] == "override train.max_steps=6"
    assert sources["train.eval_samples"] == "override ~train.eval_samples"
    assert "train.detect_nan" not in sources


@pytest.mark.parametrize("overrides", [[], ["experiment=cpu_quickstart", "zero=z3"], ["debug=smoke"]])
def test_what_no_source_set_is_at_its_default(overrides: list[str]) -> None:
    composition: Composition = compose_with_sources(overrides)
    data, defaults = plain(composition.config), plain(Config())
    for group in defaults:
        if isinstance(defaults[group], dict) and group not in ("callbacks", "deepspeed_extra"):
            for name, default in defaults[group].items():
                path = f"{group}.{name}"
                if data[group][name] != default:
                    assert any(key == path or key.startswith(f"{path}.") for key in composition.sources), path


def test_local_settings_of_a_machine(tmp_path: Path) -> None:
    folder = _folder(tmp_path, {"local/default.yaml": "# @package _global_\ndata: {cache_dir: /scratch}\n"})
    assert compose(config_dir=folder).data.cache_dir == "/scratch"
    assert compose(["local=null"], config_dir=folder).data.cache_dir is None


def test_names_are_derived_once() -> None:
    now = datetime(2026, 11, 21, 3, 4, 5)
    config = finalize(compose_with_sources(["model=tiny"]).config, now, cwd=Path("/work"))
    assert config.run.name == "tiny-python_stdlib-20261121-030405"
    assert config.run.dir == "/work/runs/tiny-python_stdlib-20261121-030405"
    assert finalize(config, datetime(2027, 1, 1), cwd=Path("/elsewhere")) == config


def test_relative_paths_become_absolute() -> None:
    overrides = ["run.dir=out/a", "checkpoint.dir=ck", "data=text", "data.path=texts/*.txt", "data.validation_path=/v"]
    config = finalize(compose_with_sources(overrides).config, datetime(2026, 1, 1), cwd=Path("/work"))
    assert (config.run.dir, config.run.name, config.checkpoint.dir) == ("/work/out/a", "a", "/work/ck")
    assert (config.data.path, config.data.validation_path) == ("/work/texts/*.txt", "/v")


def test_a_hub_id_is_not_taken_for_a_path() -> None:
    config = finalize(compose_with_sources(["data=hf", "data.path=org/name"]).config, datetime(2026, 1, 1))
    assert config.data.path == "org/name"


def test_local_folders_become_absolute_and_hub_ids_stay(tmp_path: Path) -> None:
    for name in ("my/model", "my/data", "my/tokenizer"):
        (tmp_path / name).mkdir(parents=True)
    overrides = ["model=hf", "model.path=my/model", "data=hf", "data.path=my/data", "data.tokenizer=my/tokenizer"]
    config = finalize(compose_with_sources([*overrides, "data.cache_dir=cache"]).config, datetime(2026, 1, 1), cwd=tmp_path)
    assert (config.model.path, config.data.path) == (f"{tmp_path}/my/model", f"{tmp_path}/my/data")
    assert (config.data.tokenizer, config.data.cache_dir) == (f"{tmp_path}/my/tokenizer", f"{tmp_path}/cache")
    (tmp_path / "bytes").mkdir()
    config = finalize(compose_with_sources(["model=hf", "model.path=o/m"]).config, datetime(2026, 1, 1), cwd=tmp_path)
    assert (config.model.path, config.data.tokenizer) == ("o/m", "bytes")


def test_sweep_keeps_the_searchpath(tmp_path: Path) -> None:
    searchpath = f"hydra.searchpath=[file://{tmp_path}]"
    assert sweep([searchpath, "zero=z1,z2"]) == [[searchpath, "zero=z1"], [searchpath, "zero=z2"]]


def test_arguments_of_a_command() -> None:
    assert split_arguments(["zero=z1", "--config-dir", "a", "~callbacks.x"]) == (["zero=z1", "~callbacks.x"], Path("a"))
    assert split_arguments(["--config-dir=b"]) == ([], Path("b"))


@pytest.mark.parametrize("argv", [["--config-dir"], ["--config", "x"]])
def test_arguments_that_cannot_be_read(argv: list[str]) -> None:
    with pytest.raises(ConfigError, match="--config-dir"):
        split_arguments(argv)


def test_hydra_of_the_caller_is_left_as_it_was(tmp_path: Path) -> None:
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    _folder(tmp_path, {"theirs.yaml": "a: 1\n"})
    version = {} if hydra.__version__ >= "1.4" else {"version_base": "1.3"}
    with hydra.initialize_config_dir(str(tmp_path), **version):
        compose()
        assert hydra.compose("theirs").a == 1
    assert not GlobalHydra.instance().is_initialized()


def test_reading_a_frozen_configuration_imports_neither_hydra_nor_torch() -> None:
    code = (
        "import sys; import anyshard.configs.compose, anyshard.trainer.ds_config; "
        "bad = {'hydra', 'omegaconf', 'torch', 'deepspeed', 'transformers'} & set(sys.modules); "
        "sys.exit(str(bad) if bad else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
