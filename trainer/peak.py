"""The peak rate of this rank's device, for MFU: by name for GPUs, measured on a CPU."""

from __future__ import annotations

import time

import torch

from anyshard.configs import schema
from anyshard.trainer.flops import peak_tflops


def device_peak_flops(config: schema.Config, device: torch.device) -> float | None:
    """Floating-point operations per second of one device at `precision.dtype`; None when its name is not known."""
    if config.cluster.peak_tflops is not None:
        return config.cluster.peak_tflops * 1e12
    if device.type == "cuda":
        peak = peak_tflops(torch.cuda.get_device_name(device), config.precision.dtype.value)
        return None if peak is None else peak * 1e12
    return measured_matmul_flops(config.precision.dtype.value)


def measured_matmul_flops(dtype_name: str, *, size: int = 512, seconds: float = 0.02) -> float:
    """Rate of the best matrix product on this process's CPU threads: what "peak" means where no data sheet is used.

    Products of 512 fit the caches, come near the best rate in every type, and hardly delay the start of a run.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype_name]
    generator = torch.Generator().manual_seed(0)  # its own: the run's generators must not move
    a, b = (torch.randn(size, size, generator=generator).to(dtype) for _ in range(2))
    torch.mm(a, b)
    best_s = float("inf")
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        started = time.perf_counter()
        torch.mm(a, b)
        best_s = min(best_s, time.perf_counter() - started)
    return 2 * size**3 / best_s
