"""What each backend would run, as text: looked at by a person, and by shellcheck where it is installed."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.configs import make_config
from helpers.golden import compare

from anyshard.configs import registry
from anyshard.launch.env import Hardware
from anyshard.launch.spec import LaunchSpec, build_spec

HERE = Path(__file__).parent / "launch"
LOGIN = Hardware(num_gpus=0, gpu_name=None, gpu_memory_gib=None, host_memory_gib=24.0, num_cores=8)
H100 = {"cluster.name": "8xh100", "cluster.devices_per_node": 8, "launch.procs_per_node": 8}
CPU = {"cluster.name": "cpu", "launch.procs_per_node": 2}

CASES = {
    "slurm-1": {**CPU, "launch.name": "slurm"},
    "slurm-2": {
        **H100,
        "launch.name": "slurm",
        "launch.nodes": 2,
        "launch.slurm.partition": "gpu",
        "launch.slurm.time_min": 60,
    },
    "slurm-2-torchrun": {
        **H100,
        "launch.name": "slurm",
        "launch.nodes": 2,
        "launch.slurm.starter": "torchrun",
        "launch.slurm.cpus_per_task": 12,
        "launch.slurm.requeue": False,
    },
    "slurm-64": {
        **H100,
        "launch.name": "slurm",
        "launch.nodes": 64,
        "launch.min_nodes": 32,
        "launch.env": {"NCCL_SOCKET_IFNAME": "=ib0,ib1"},
        "launch.slurm.account": "proj 7",
        "launch.slurm.partition": "gpu",
        "launch.slurm.qos": "long",
        "launch.slurm.time_min": 1440,
        "launch.slurm.constraint": "h100&ib",
        "launch.slurm.exclusive": True,
        "launch.slurm.gpu_type": "h100",
        "launch.slurm.cpus_per_task": 12,
        "launch.slurm.mem": "0",
        "launch.slurm.exclude": "gpu[007,019]",
        "launch.slurm.array": 7,
        "launch.slurm.container_image": "/images/any shard.sqsh",
        "launch.slurm.container_mounts": ["/data:/data:ro"],
        "launch.slurm.python": "/usr/bin/python3",
        "launch.slurm.modules": ["cuda/13.0", "nccl"],
        "launch.slurm.prologue": ["ulimit -l unlimited"],
        "launch.slurm.directives": ["--mail-type=FAIL"],
        "launch.slurm.srun_args": ["--cpu-bind=cores"],
    },
    "torchrun-1": {**CPU, "launch.name": "torchrun"},
    "torchrun-2-c10d": {**H100, "launch.name": "torchrun", "launch.nodes": 2, "launch.torchrun.max_restarts": 3},
    "torchrun-2-static": {
        **H100,
        "launch.name": "torchrun",
        "launch.nodes": 2,
        "launch.port": 29400,
        "launch.torchrun.rendezvous": "static",
        "launch.torchrun.host": "10.0.0.1",
    },
    "deepspeed-1": {**CPU, "launch.name": "deepspeed"},
    "deepspeed-2-pdsh": {
        **H100,
        "launch.name": "deepspeed",
        "launch.nodes": 2,
        "launch.deepspeed.hosts": ["node0", "node1", "node2"],
        "launch.deepspeed.exclude": "node1",
    },
    "deepspeed-2-openmpi": {
        **H100,
        "launch.name": "deepspeed",
        "launch.nodes": 2,
        "launch.deepspeed.hosts": ["node0", "node1"],
        "launch.deepspeed.runner": "openmpi",
        "launch.deepspeed.launcher_args": "--mca btl_tcp_if_include ib0",
    },
    "deepspeed-2-no_ssh": {
        **H100,
        "launch.name": "deepspeed",
        "launch.nodes": 2,
        "launch.deepspeed.hosts": ["node0", "node1"],
        "launch.deepspeed.runner": "no_ssh",
    },
    "local-1": {**CPU, "launch.name": "local"},
}


def rendered(name: str) -> str:
    """What the case would run, with what differs between machines replaced."""
    config = make_config(CASES[name])
    spec: LaunchSpec = build_spec(config, Path("/shared/runs/llama"), LOGIN)
    env = {**spec.env, "PATH": "/venv/bin:/usr/bin", "TORCH_EXTENSIONS_DIR": "/shared/extensions"}
    spec = replace(spec, python="/venv/bin/python", host="node0", env=env)
    text: str = registry.lookup("launch", config.launch.name, key="launch.name")().render(spec).text()
    return text if text.endswith("\n") else text + "\n"


@pytest.mark.parametrize("name", CASES)
def test_text(name: str, pytestconfig: pytest.Config) -> None:
    compare(HERE / f"{name}.txt", rendered(name), pytestconfig)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("slurm")])
def test_the_script_is_clean(name: str, tmp_path: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: apt-get install shellcheck")
    text = rendered(name)
    script = tmp_path / "job.sbatch"
    script.write_text(text[text.index("#!") :])
    done = subprocess.run(["shellcheck", "--shell=bash", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_no_case_is_forgotten() -> None:
    assert {path.stem for path in HERE.glob("*.txt")} == set(CASES)
    assert {name.partition("-")[0] for name in CASES} == set(registry.names("launch"))
