"""Lion against its algorithm written out in numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from anyshard.trainer.optim import elementwise
from anyshard.trainer.optim.lion import Lion


def test_two_steps_by_hand() -> None:
    param = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = Lion([param], lr=0.1, betas=(0.9, 0.99), weight_decay=0.5)
    param.grad = torch.tensor([3.0, -1.0])
    optimizer.step()
    torch.testing.assert_close(param.detach(), torch.tensor([1.0 * 0.95 - 0.1, -2.0 * 0.95 + 0.1]))
    torch.testing.assert_close(optimizer.state[param]["exp_avg"], torch.tensor([0.03, -0.01]))
    before = param.detach().clone()
    param.grad = torch.tensor([-1.0, 1.0])  # 0.9 * 0.03 - 0.1 < 0 and 0.9 * -0.01 + 0.1 > 0: the signs turn
    optimizer.step()
    torch.testing.assert_close(param.detach(), before * 0.95 + torch.tensor([0.1, -0.1]))


def test_closure_is_called_with_gradients_on() -> None:
    param = nn.Parameter(torch.tensor([1.0]))
    optimizer = Lion([param], lr=0.1, betas=(0.9, 0.99), weight_decay=0.0)

    def closure() -> float:
        loss = param.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 1.0
    assert param.item() < 1.0


def test_a_parameter_without_gradient_stays() -> None:
    param = nn.Parameter(torch.tensor([1.0]))
    Lion([param], lr=0.1, betas=(0.9, 0.99), weight_decay=0.5).step()
    assert param.item() == 1.0


@pytest.mark.parametrize("transpose", [False, True])
def test_chunks_do_not_change_the_result(transpose: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained() -> torch.Tensor:
        torch.manual_seed(0)
        tensor = torch.randn(7, 5)
        param = nn.Parameter(tensor.t() if transpose else tensor)
        optimizer = Lion([param], lr=0.1, betas=(0.9, 0.99), weight_decay=0.5)
        for _ in range(3):
            param.grad = torch.randn_like(param)
            optimizer.step()
        return param.detach()

    whole = trained()
    monkeypatch.setattr(elementwise, "CHUNK_ON_CPU", 4)
    assert torch.equal(trained(), whole)
