"""`torchrun ... -m anyshard.parallel.collective_check`: time an all-reduce over all ranks; rank 0 prints JSON.

It starts the process group as training does, so what it shows is what training gets.
"""

from __future__ import annotations

import json
import os
import time

import torch
import torch.distributed as dist

from anyshard.parallel.comm import device_of, init_distributed
from anyshard.parallel.rank_env import discover

SMALL_BYTES = 8
LARGE_BYTES = 64 * 2**20


def measure(num_bytes: int, device: torch.device, *, repeats: int) -> float:
    """Seconds of one all-reduce of a tensor of this size, the mean of `repeats` after a warm-up.

    Collective: every rank of the default group calls it; it blocks.

    Raises:
        RuntimeError: the sum is wrong.
    """
    world_size = dist.get_world_size()
    tensor = torch.ones(num_bytes // 4, device=device)
    dist.all_reduce(tensor)
    if not bool((tensor == world_size).all()):
        raise RuntimeError(f"the sum of ones over {world_size} ranks is {tensor.min().item()} to {tensor.max().item()}")
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        dist.all_reduce(tensor)
    _wait(device)
    return (time.perf_counter() - start) / repeats


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    dist.barrier()


def report(device: torch.device) -> dict[str, object]:
    """Latency and bus bandwidth, as nccl-tests defines it: bytes over time times 2 (n-1) / n.

    Collective: every rank calls it; it blocks.
    """
    world_size = dist.get_world_size()
    latency_s = measure(SMALL_BYTES, device, repeats=50)
    large_s = measure(LARGE_BYTES, device, repeats=5)
    return {
        "backend": dist.get_backend(),
        "world_size": world_size,
        "latency_us": latency_s * 1e6,
        "bus_gb_per_s": LARGE_BYTES / large_s * 2 * (world_size - 1) / world_size / 1e9,
    }


def main() -> None:
    """Join, measure, print on rank 0, leave."""
    env = discover(os.environ)
    device = device_of(env)
    init_distributed(env, device, timeout_s=120)
    result = report(device)
    if env.rank == 0:
        print(json.dumps(result), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
