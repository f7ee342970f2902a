import pytest
from helpers.configs import make_config

from anyshard.configs.frozen import freeze
from anyshard.launch import node
from anyshard.launch.backend_torchrun import TorchrunBackend


@pytest.fixture
def run_dir(tmp_path):
    config = make_config({"launch.nodes": 3, "launch.name": "torchrun", "launch.torchrun.host": "first"})
    freeze(config, [], tmp_path)
    return tmp_path


def test_by_hand_the_node_is_told_its_number(run_dir):
    spec = node.node_spec(run_dir, 2, "10.0.0.1", {})
    assert (spec.node_rank, spec.options.torchrun.host, spec.nodes) == (2, "10.0.0.1", 3)
    assert node.node_spec(run_dir, None, None, {}).options.torchrun.host == "first"


def test_in_a_job_slurm_knows_it(run_dir):
    environ = {
        "SLURM_STEP_ID": "0",
        "SLURM_NODEID": "1",
        "SLURM_STEP_NUM_NODES": "2",
        "MASTER_ADDR": "10.1.1.1",
        "MASTER_PORT": "20007",
    }
    argv = TorchrunBackend().render(node.node_spec(run_dir, None, None, environ)).argv
    assert {"--nnodes=2", "--node-rank=1", "--master-addr=10.1.1.1", "--master-port=20007"} <= set(argv)


def test_what_is_no_run_is_told(tmp_path, capsys):
    assert node.main([str(tmp_path)]) == 2
    assert "ConfigError: run directory=" in capsys.readouterr().err
