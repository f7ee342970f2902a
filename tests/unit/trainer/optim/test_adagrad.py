"""Adagrad against torch's, and its decay in numbers."""

from __future__ import annotations

import torch
from torch import nn

from anyshard.trainer.optim import elementwise
from anyshard.trainer.optim.adagrad import Adagrad


def test_without_decay_it_is_torchs(monkeypatch):
    monkeypatch.setattr(elementwise, "CHUNK_ON_CPU", 7)
    ours, theirs = (nn.Parameter(torch.linspace(-2, 2, 20)) for _ in range(2))
    mine = Adagrad([ours], lr=0.3, eps=1e-10, weight_decay=0.0)
    reference = torch.optim.Adagrad([theirs], lr=0.3, eps=1e-10)
    for step in range(4):
        for param in (ours, theirs):
            param.grad = torch.cos(torch.arange(20.0) * step)
        mine.step()
        reference.step()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(mine.state[ours]["sum"], reference.state[theirs]["sum"])


def test_decay_does_not_enter_the_sum():
    param = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = Adagrad([param], lr=0.1, eps=1e-10, weight_decay=0.5)
    param.grad = torch.tensor([3.0, 0.0])
    optimizer.step()
    torch.testing.assert_close(param.detach(), torch.tensor([1.0 * 0.95 - 0.1, -2.0 * 0.95]))
    assert optimizer.state[param]["sum"].tolist() == [9.0, 0.0]


def test_closure_is_called_with_gradients_on():
    param, without = nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([1.0]))
    optimizer = Adagrad([param, without], lr=0.1, eps=1e-10, weight_decay=0.0)

    def closure() -> float:
        loss = param.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 1.0
    assert param.item() < 1.0
    assert without.item() == 1.0
