"""What optimizers that look at one element at a time share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch

CHUNK_ON_CPU, CHUNK = 1 << 18, 1 << 24
"""Elements updated at once: ZeRO makes one flat tensor of a group, and updates need temporaries; 1 MiB stays in the cache."""


class Elementwise(torch.optim.Optimizer):
    """An optimizer that updates parameters one by one, whatever part of a tensor each is."""

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
                    self._update(param, param.grad, group)
        return loss

    @abstractmethod
    def _update(self, param: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        """Step one parameter, its state included."""


def chunks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same parts of each, as views, so that temporaries stay small; all at once where one is not contiguous."""
    if all(tensor.is_contiguous() for tensor in tensors):
        size = CHUNK_ON_CPU if tensors[0].is_cpu else CHUNK
        yield from zip(*(torch.split(tensor.view(-1), size) for tensor in tensors), strict=True)
    else:
        yield tensors
