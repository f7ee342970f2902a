import pytest
import torch

from anyshard.configs.errors import EnvError
from anyshard.parallel.comm import device_of
from anyshard.parallel.rank_env import RankEnv


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
