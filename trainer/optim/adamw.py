"""AdamW: torch's on the device, DeepSpeed's vectorised one where the optimizer state lives on the CPU."""

from __future__ import annotations

from typing import Any

import torch

from anyshard.configs import schema


def build(
    groups: list[dict[str, Any]], optimizer: schema.Optimizer, *, offloaded: bool, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW over `groups` (of `param_groups`).

    Args:
        offloaded: optimizer state lives on the CPU or NVMe.
        device: where the parameters are; CUDA and the CPU take the fused kernel.

    Source: Loshchilov and Hutter, arXiv 1711.05101, algorithm 2.
    """
    beta1, beta2 = optimizer.betas
    options: dict[str, Any] = {"lr": optimizer.lr, "betas": (beta1, beta2), "eps": optimizer.eps}
    if offloaded:
        from anyshard.offload.ops import cpu_optimizer

        # without adamw_mode weight decay would be added to the gradient, as in Adam with L2
        on_cpu = cpu_optimizer("adamw")(groups, weight_decay=optimizer.weight_decay, adamw_mode=True, **options)
        return _without_history(on_cpu)
    # on a CPU it is five times faster than torch's default, which reads the tensors once for each operation
    fused = True if device.type in ("cuda", "cpu") else None
    return torch.optim.AdamW(groups, weight_decay=optimizer.weight_decay, fused=fused, **options)


def _without_history(optimizer: Any) -> torch.optim.Optimizer:
    """Make DeepSpeed's CPU Adam compute beta**step anew at each step, so that a resumed run goes on bit for bit.

    Its C++ part multiplies a running product where steps follow each other and takes a power where they do not, as in the
    first step after a restore; the two differ in the last bits. A step number of 0 before each step, on one element that
    nobody reads, makes every step one that does not follow.

    Source: deepspeed 0.19.8 ops/csrc/includes/cpu_adam.h:71, `IncrementStep`.
    """
    scratch = [torch.zeros(1) for _ in range(4)]

    def forget(*_: Any) -> None:
        optimizer.ds_opt_adam.adam_update(optimizer.opt_id, 0, 0.0, *optimizer.defaults["betas"], 1.0, 0.0, False, *scratch)

    optimizer.register_step_pre_hook(forget)
    built: torch.optim.Optimizer = optimizer
    return built
