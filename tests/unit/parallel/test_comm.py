import socket

import pytest
import torch

from anyshard.configs.errors import EnvError
from anyshard.parallel.comm import RankEnv, device_of, discover, free_port

TORCHRUN = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "host",
    "MASTER_PORT": "29500",
}


def test_the_environment_of_torchrun():
    assert discover(TORCHRUN) == RankEnv(3, 1, 4, 2, "host", 29500)


def test_no_launcher_is_one_process():
    env = discover({"HOME": "/root"})
    assert (env.rank, env.world_size, env.local_world_size, env.master_addr) == (0, 1, 1, "127.0.0.1")


def test_half_an_environment_is_refused():
    with pytest.raises(EnvError, match="MASTER_ADDR, MASTER_PORT not set"):
        discover({"RANK": "0", "WORLD_SIZE": "2"})


def test_a_rank_outside_the_world_is_refused():
    with pytest.raises(EnvError, match=r"RANK=4 with WORLD_SIZE=4: ranks are 0 to 3"):
        discover({**TORCHRUN, "RANK": "4"})


def test_a_free_port_can_be_bound():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", free_port()))


@pytest.mark.parametrize(("gpus", "local_rank", "refused"), [(0, 5, False), (2, 2, True)])
def test_more_ranks_than_gpus_are_refused(monkeypatch, gpus, local_rank, refused):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    env = RankEnv(local_rank, local_rank, 8, 8, "127.0.0.1", 1)
    if refused:
        with pytest.raises(EnvError, match=r"local rank 2 has no GPU: this node has 2\. Set launch\.procs_per_node=2"):
            device_of(env)
    else:
        assert device_of(env) == torch.device("cpu")
