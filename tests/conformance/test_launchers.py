"""What every registered launcher must do: render purely, name the run directory and the ranks, pass the environment."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest

from anyshard.configs import registry, schema
from anyshard.launch.env import Hardware
from anyshard.launch.spec import LaunchSpec, build_spec

NAMES = registry.names("launch")
HARDWARE = {
    "cpu": Hardware(num_gpus=0, gpu_name=None, gpu_memory_gib=None, host_memory_gib=24.0, num_cores=8),
    "gpu": Hardware(num_gpus=8, gpu_name="NVIDIA H100 80GB HBM3", gpu_memory_gib=80.0, host_memory_gib=2000.0, num_cores=128),
}


def spec_for(name: str, hardware: str, run_dir: Path) -> LaunchSpec:
    config = schema.Config()
    config.launch.name, config.launch.procs_per_node, config.launch.env = name, 4, {"MY_VARIABLE": "7"}
    return build_spec(config, run_dir, HARDWARE[hardware])


@pytest.mark.parametrize("hardware", HARDWARE)
@pytest.mark.parametrize("name", NAMES)
def test_rendering_is_pure(tmp_path, name, hardware):
    backend = registry.lookup("launch", name, key="launch.name")()
    spec = spec_for(name, hardware, tmp_path / "run")
    first, second = backend.render(spec), backend.render(spec)
    assert first == second
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("hardware", HARDWARE)
@pytest.mark.parametrize("name", NAMES)
def test_the_ranks_get_what_they_need(tmp_path, name, hardware):
    rendered = registry.lookup("launch", name, key="launch.name")().render(spec_for(name, hardware, tmp_path / "run"))
    text = rendered.text()
    assert str(tmp_path / "run") in text
    assert "anyshard.trainer.run" in text
    assert "4" in text
    assert rendered.env["MY_VARIABLE"] == "7"
    assert int(rendered.env["OMP_NUM_THREADS"]) >= 1
    assert ("DS_ACCELERATOR" in rendered.env) == (hardware == "cpu")


@pytest.mark.parametrize("name", NAMES)
def test_has_a_choice_of_its_name(name):
    assert (files("anyshard.configs") / "launch" / f"{name}.yaml").is_file()
