"""Optimizers whose states do not have the shape of what they step, as users bring them along: for the tests of checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

BLOCK = 16


class BlockAdam8bit(torch.optim.Optimizer):
    """Adam whose moments are codes of 8 bits, with one scale for each block of 16 elements; small tensors stay in fp32.

    As bitsandbytes does it (Dettmers et al., arXiv 2110.02861): state1, state2 and their absmax1, absmax2.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-2, betas: tuple[float, float] = (0.9, 0.95), **group: Any) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": 0.0, **group})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, param.grad, group)

    def _update(self, param: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        state, small = self.state[param], param.numel() < 4 * BLOCK
        if not state:
            state["step"] = 0
            for moment in ("1", "2"):
                state[f"state{moment}"] = torch.zeros_like(param, dtype=torch.float32 if small else torch.uint8)
                if not small:
                    state[f"state{moment}"].fill_(127)
                    state[f"absmax{moment}"] = torch.zeros(-(-param.numel() // BLOCK))
        state["step"] += 1
        (beta1, beta2), count = group["betas"], state["step"]
        first = self._load(state, "1", param).lerp_(grad, 1 - beta1)
        second = self._load(state, "2", param).mul_(beta2).addcmul_(grad, grad, value=1 - beta2).clamp_(min=0)
        param.mul_(1 - group["lr"] * group["weight_decay"])
        update = first / (1 - beta1**count) / ((second / (1 - beta2**count)).sqrt() + 1e-3)
        param.sub_(update, alpha=group["lr"])
        self._keep(state, "1", first)
        self._keep(state, "2", second)

    def _load(self, state: dict[str, Any], moment: str, param: torch.Tensor) -> torch.Tensor:
        codes = state[f"state{moment}"]
        if codes.dtype == torch.float32:
            return codes.clone()  # type: ignore[no-any-return]
        scales = state[f"absmax{moment}"].repeat_interleave(BLOCK)[: codes.numel()]
        return ((codes.view(-1).float() - 127) / 127 * scales).view(param.shape)  # type: ignore[no-any-return]

    def _keep(self, state: dict[str, Any], moment: str, value: torch.Tensor) -> None:
        if state[f"state{moment}"].dtype == torch.float32:
            state[f"state{moment}"].copy_(value)
            return
        flat = torch.nn.functional.pad(value.reshape(-1), (0, -value.numel() % BLOCK)).view(-1, BLOCK)
        scales = flat.abs().amax(dim=1)
        state[f"absmax{moment}"].copy_(scales)
        codes = (flat / scales.clamp(min=1e-30).unsqueeze(1) * 127).round() + 127
        state[f"state{moment}"].copy_(codes.view(-1)[: value.numel()].view(value.shape))


class Factored(torch.optim.Optimizer):
    """Adafactor without its schedule: a second moment of rows and columns where there are two dims, and a scalar each.

    Source: Shazeer and Stern, arXiv 1804.04235, algorithm 4.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-2, **group: Any) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0, **group})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, param.grad, group)

    def _update(self, param: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        if not state:
            state["step"], state["rms"] = torch.zeros((), dtype=torch.int64), 0.0
            if param.dim() == 2:
                state["row"], state["col"] = torch.zeros(param.shape[0]), torch.zeros(param.shape[1])
            else:
                state["exp_avg_sq"] = torch.zeros_like(param)
        state["step"] += 1
        decay = 1 - int(state["step"]) ** -0.8
        square = grad.square() + 1e-12
        if param.dim() == 2:
            row, col = state["row"].lerp_(square.mean(1), 1 - decay), state["col"].lerp_(square.mean(0), 1 - decay)
            second = row.unsqueeze(1) * col / row.mean()
        else:
            second = state["exp_avg_sq"].lerp_(square, 1 - decay)
        update = grad / second.sqrt()
        # its last value is part of the next update, so that a run which lost it goes on differently
        state["rms"] = float(0.5 * state["rms"] + 0.5 * update.square().mean().sqrt())
        param.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"] / max(1.0, state["rms"]))


OPTIMIZERS = {"adam8bit": BlockAdam8bit, "factored": Factored}
