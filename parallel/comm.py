"""From a place among the ranks to process groups: the device of this rank, and how it talks to the others.

Called once by `trainer/fit.py`. Everything that communicates afterwards takes its group as an argument.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import logging
import os

import torch
import torch.distributed as dist

from anyshard.configs.errors import EnvError
from anyshard.parallel.rank_env import RankEnv

logger = logging.getLogger(__name__)


def device_of(env: RankEnv) -> torch.device:
    """The accelerator of this rank, or the CPU.

    Raises:
        EnvError: this node has fewer GPUs than ranks.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if env.local_rank >= torch.cuda.device_count():
        raise EnvError(
            f"local rank {env.local_rank} has no GPU: this node has {torch.cuda.device_count()}. "
            f"Set launch.procs_per_node={torch.cuda.device_count()}, "
            "or hide the GPUs with CUDA_VISIBLE_DEVICES= to run on the CPU."
        )
    torch.cuda.set_device(env.local_rank)
    return torch.device("cuda", env.local_rank)


def init_distributed(env: RankEnv, device: torch.device, *, timeout_s: float) -> None:
    """Start torch.distributed and DeepSpeed's wrapper over it: NCCL on GPUs, gloo on CPUs.

    Collective: every rank calls it; it blocks until all have, or `timeout_s` has passed.

    Raises:
        EnvError: the other ranks could not be reached.
    """
    import deepspeed

    os.environ.update(
        RANK=str(env.rank),
        LOCAL_RANK=str(env.local_rank),
        LOCAL_WORLD_SIZE=str(env.local_world_size),
        WORLD_SIZE=str(env.world_size),
        MASTER_ADDR=env.master_addr,
        MASTER_PORT=str(env.master_port),
    )
    try:
        # DeepSpeed prints the names of operators that it loads; standard output is for people
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            deepspeed.init_distributed(
                dist_backend="nccl" if device.type == "cuda" else "gloo",
                auto_mpi_discovery=False,
                verbose=False,
                timeout=datetime.timedelta(seconds=timeout_s),
            )
        logger.info("%s", printed.getvalue().strip())
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        where = f"{env.master_addr}:{env.master_port}"
        first = str(error).splitlines()[0]
        raise EnvError(
            f"the ranks could not meet at {where} (MASTER_ADDR:MASTER_PORT): {first} Choose another port with launch.port."
        ) from error


def control_group(env: RankEnv, *, timeout_s: float) -> dist.ProcessGroup | None:
    """A gloo group of all ranks for decisions or for checkpoints, apart from the training collectives; None when alone.

    Collective: every rank calls it, in the same order as other group creations; it blocks.
    """
    if env.world_size == 1:
        return None
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))
    return group
