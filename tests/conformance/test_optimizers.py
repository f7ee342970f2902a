"""What every registered optimizer must do; a new one is tested by being registered."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn

from anyshard.configs import schema
from anyshard.configs.registry import lookup, names
from anyshard.trainer.optim.groups import param_groups
from anyshard.trainer.optim.states import FP32_BYTES, STATES, state_bytes_per_param

LR = {"adamw": 0.05, "lion": 0.01, "sgd": 0.05, "adagrad": 0.5}
CASES = list(itertools.product(names("optimizer"), (False, True)))


class _Quadratic(nn.Module):
    """Distance of a matrix and a vector from fixed ones."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.matrix = nn.Parameter(torch.randn(16, 8, generator=generator))
        self.vector = nn.Parameter(torch.randn(8, generator=generator))
        self.target = torch.randn(16, 8, generator=generator)

    def forward(self) -> torch.Tensor:
        return (self.matrix + self.vector - self.target).square().mean()


def _optimizer(name: str, offloaded: bool, model: nn.Module, **keys: Any) -> torch.optim.Optimizer:
    group = schema.Optimizer(name=name, lr=LR.get(name, 0.01), **{"weight_decay": 0.0, **keys})
    groups = param_groups(model.named_parameters(), group, set())
    build = lookup("optimizer", name, key="optimizer.name")
    return build(groups, group, offloaded=offloaded, device=torch.device("cpu"))  # type: ignore[no-any-return]


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model().backward()
        optimizer.step()


@pytest.mark.parametrize(("name", "offloaded"), CASES)
def test_converges_on_a_quadratic(name: str, offloaded: bool) -> None:
    model = _Quadratic()
    start = model().item()
    _train(model, _optimizer(name, offloaded, model), 300)
    assert model().item() < 0.02 * start


@pytest.mark.parametrize(("name", "offloaded"), CASES)
def test_resumed_from_its_state_dict_goes_on_as_if_never_stopped(name: str, offloaded: bool) -> None:
    straight, stopped = _Quadratic(), _Quadratic()
    _train(straight, _optimizer(name, offloaded, straight), 8)
    first = _optimizer(name, offloaded, stopped)
    _train(stopped, first, 5)
    state = copy.deepcopy(first.state_dict())
    second = _optimizer(name, offloaded, stopped)
    second.load_state_dict(state)
    for group, again in zip(first.param_groups, second.param_groups, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in again.items() if k != "params"}
    _train(stopped, second, 3)
    assert torch.equal(straight.matrix, stopped.matrix)
    assert torch.equal(straight.vector, stopped.vector)


@pytest.mark.parametrize(("name", "offloaded"), CASES)
def test_decays_only_what_is_to_decay(name: str, offloaded: bool) -> None:
    """With no gradient the matrix shrinks by 1 - lr * weight_decay (a first step of momentum too), the vector stays."""
    model = _Quadratic()
    matrix, vector = model.matrix.detach().clone(), model.vector.detach().clone()
    optimizer = _optimizer(name, offloaded, model, weight_decay=0.5)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    torch.testing.assert_close(model.matrix.detach(), matrix * (1 - optimizer.param_groups[0]["lr"] * 0.5))
    assert torch.equal(model.vector, vector)


@pytest.mark.parametrize(("name", "offloaded"), CASES)
def test_leaves_alone_what_never_had_a_gradient(name: str, offloaded: bool) -> None:
    model = _Quadratic()
    optimizer = _optimizer(name, offloaded, model)
    row = model.matrix[3].detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        model().backward()
        assert model.matrix.grad is not None
        model.matrix.grad[3] = 0
        optimizer.step()
    assert torch.equal(model.matrix[3], row)
    assert not torch.equal(model.matrix[4], _Quadratic().matrix[4])


@pytest.mark.parametrize(("name", "offloaded"), CASES)
def test_each_group_takes_its_own_learning_rate(name: str, offloaded: bool) -> None:
    model = _Quadratic()
    optimizer = _optimizer(name, offloaded, model)
    optimizer.param_groups[1]["lr"] = 0.0
    vector = model.vector.detach().clone()
    matrix = model.matrix.detach().clone()
    _train(model, optimizer, 2)
    assert torch.equal(model.vector, vector)
    assert not torch.equal(model.matrix, matrix)


@pytest.mark.parametrize(("name", "offloaded"), [case for case in CASES if case[0] in STATES])
def test_keeps_the_state_that_it_declares(name: str, offloaded: bool) -> None:
    model = _Quadratic()
    optimizer = _optimizer(name, offloaded, model)
    _train(model, optimizer, 1)
    state = optimizer.state[model.matrix]
    tensors = {key: value for key, value in state.items() if torch.is_tensor(value) and value.shape == model.matrix.shape}
    assert set(tensors) == set(STATES[name])
    measured = sum(value.numel() * value.element_size() for value in tensors.values())
    assert measured == model.matrix.numel() * (state_bytes_per_param(name) or 0)
    assert all(value.dtype == torch.float32 and value.element_size() == FP32_BYTES for value in tensors.values())


def test_every_optimizer_of_ours_declares_its_state() -> None:
    assert set(STATES) == set(names("optimizer"))
    assert state_bytes_per_param("sgd", momentum=0) == 0
    assert state_bytes_per_param("somebody_elses") is None


@pytest.mark.parametrize(("name", "offloaded"), CASES)
def test_on_the_cpu_and_offloaded_agree(name: str, offloaded: bool) -> None:
    reference, model = _Quadratic(), _Quadratic()
    _train(reference, _optimizer(name, False, reference, weight_decay=0.1), 5)
    _train(model, _optimizer(name, offloaded, model, weight_decay=0.1), 5)
    torch.testing.assert_close(model.matrix, reference.matrix, rtol=1e-5, atol=1e-6)
