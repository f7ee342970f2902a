"""SGD with momentum: torch's, wherever the optimizer state lives."""

from __future__ import annotations

from typing import Any

import torch

from anyshard.configs import schema


def build(
    groups: list[dict[str, Any]], optimizer: schema.Optimizer, *, offloaded: bool, device: torch.device
) -> torch.optim.Optimizer:
    """SGD over `groups` (of `param_groups`); its weight decay is added to the gradient.

    Args:
        offloaded: makes no difference: DeepSpeed moves the masters, and torch steps them on the CPU.
        device: where the parameters are; CUDA takes the fused kernel where the state is there too.
    """
    return torch.optim.SGD(
        groups,
        lr=optimizer.lr,
        momentum=optimizer.momentum,
        weight_decay=optimizer.weight_decay,
        fused=True if device.type == "cuda" and not offloaded else None,
    )
