"""Adagrad: the learning rate of every element falls with the sum of its squared gradients.

torch's class is not used: DeepSpeed builds it anew around its flat partitions, from its defaults, and the param groups with
their learning rates and weight decays are lost (deepspeed 0.19.8 runtime/zero/stage_1_and_2.py:946, stage3.py:1357).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from anyshard.configs import schema
from anyshard.trainer.optim.elementwise import Elementwise, chunks


class Adagrad(Elementwise):
    """Adagrad with decoupled weight decay.

    Source: Duchi et al., JMLR 12 (2011), figure 1, the diagonal form; the decay, Loshchilov and Hutter, arXiv 1711.05101.
    """

    def __init__(self, params: Iterable[Any], lr: float, eps: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay})

    def _update(self, param: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        if not state:
            state["sum"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        for weight, part, total in chunks(param, grad, state["sum"]):
            total.addcmul_(part, part)
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.addcdiv_(part, total.sqrt().add_(group["eps"]), value=-group["lr"])


def build(
    groups: list[dict[str, Any]], optimizer: schema.Optimizer, *, offloaded: bool, device: torch.device
) -> torch.optim.Optimizer:
    """Adagrad over `groups` (of `param_groups`).

    Args:
        offloaded: makes no difference: DeepSpeed moves the masters, and they are stepped on the CPU.
        device: where the parameters are; makes no difference.
    """
    return Adagrad(groups, lr=optimizer.lr, eps=optimizer.eps, weight_decay=optimizer.weight_decay)
