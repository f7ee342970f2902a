"""Adagrad: the learning rate of every element falls with the sum of its squared gradients.

torch's class is not used: DeepSpeed builds it anew around its flat partitions, from its defaults, and the param groups with
their learning rates and weight decays are lost (deepspeed 0.19.8 runtime/zero/stage_1_and_2.py:946, stage3.py:1357).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from anyshard.configs import schema
from anyshard.trainer.optim.chunks import chunks


class Adagrad(torch.optim.Optimizer):
    """Adagrad with decoupled weight decay.

    Source: Duchi et al., JMLR 12 (2011), figure 1, the diagonal form; the decay, Loshchilov and Hutter, arXiv 1711.05101.
    """

    def __init__(self, params: Iterable[Any], lr: float, eps: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group)
        return loss

    def _update(self, param: torch.Tensor, group: dict[str, Any]) -> None:
        assert param.grad is not None
        state = self.state[param]
        if not state:
            state["sum"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        for weight, grad, total in chunks(param, param.grad, state["sum"]):
            total.addcmul_(grad, grad)
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.addcdiv_(grad, total.sqrt().add_(group["eps"]), value=-group["lr"])


def build(
    groups: list[dict[str, Any]], optimizer: schema.Optimizer, *, offloaded: bool, device: torch.device
) -> torch.optim.Optimizer:
    """Adagrad over `groups` (of `param_groups`).

    Args:
        offloaded: makes no difference: DeepSpeed moves the masters, and they are stepped on the CPU.
        device: where the parameters are; makes no difference.
    """
    return Adagrad(groups, lr=optimizer.lr, eps=optimizer.eps, weight_decay=optimizer.weight_decay)
