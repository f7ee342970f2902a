"""Lion: one momentum, sign updates; a few torch operations wherever the optimizer state lives.

DeepSpeed's CPU Lion is not used. Where a gradient and its momentum are zero it moves the weight by the learning rate, since it
takes the sign by `copysign`: rows of the embedding that a batch does not meet would drift at every step. And it allocates a
second state tensor that it never reads. Both: deepspeed 0.19.8 ops/csrc/includes/cpu_lion.h:120, ops/lion/cpu_lion.py:121.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from anyshard.configs import schema
from anyshard.trainer.optim.elementwise import Elementwise, chunks


class Lion(Elementwise):
    """Lion with decoupled weight decay.

    Its steps have the size of the learning rate whatever the gradient, so it wants a learning rate three to ten times
    smaller than AdamW's, and a weight decay as much larger.

    Source: Chen et al., arXiv 2302.06675, algorithm 2 (section 5 for the hyper-parameters).
    """

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def _update(self, param: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        if not state:
            state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        beta1, beta2 = group["betas"]
        for weight, part, exp_avg in chunks(param, grad, state["exp_avg"]):
            direction = exp_avg.lerp(part, 1 - beta1).sign_()
            weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
            exp_avg.lerp_(part, 1 - beta2)


def build(
    groups: list[dict[str, Any]], optimizer: schema.Optimizer, *, offloaded: bool, device: torch.device
) -> torch.optim.Optimizer:
    """Lion over `groups` (of `param_groups`).

    Args:
        offloaded: makes no difference: DeepSpeed moves the masters, and they are stepped on the CPU.
        device: where the parameters are; makes no difference.
    """
    beta1, beta2 = optimizer.betas
    return Lion(groups, lr=optimizer.lr, betas=(beta1, beta2), weight_decay=optimizer.weight_decay)
