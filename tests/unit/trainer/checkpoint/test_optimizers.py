"""Creating, filling and describing optimizer state, without an engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.optimizers import BlockAdam8bit, Factored
from torch import nn

from anyshard.configs.errors import CheckpointError
from anyshard.trainer.checkpoint.layout import Slot, view_of
from anyshard.trainer.checkpoint.manifest import Scalar, Tensor
from anyshard.trainer.checkpoint.optimizers import (
    check_groups,
    check_kind,
    create_states,
    fragments,
    hyper_parameters,
    scalars,
    set_hyper_parameters,
)
from anyshard.trainer.optim.lion import Lion


def whole(name: str, param: torch.Tensor) -> Slot:
    return Slot(name, tuple(param.shape), 0, param.numel(), param, 0, param, replicated=True)


def params() -> tuple[nn.Parameter, nn.Parameter]:
    torch.manual_seed(0)
    return nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(()))


def groups(weight: nn.Parameter, bias: nn.Parameter) -> list[dict[str, Any]]:
    return [
        {"name": "decay", "params": [weight], "weight_decay": 0.1, "lr": 0.3},
        {"name": "no_decay", "params": [bias], "weight_decay": 0.0, "lr": 0.2},
    ]


BUILDERS = {
    "AdamW": lambda groups: torch.optim.AdamW(groups, betas=(0.8, 0.9)),
    "AdamW amsgrad": lambda groups: torch.optim.AdamW(groups, amsgrad=True),
    "SGD": lambda groups: torch.optim.SGD(groups, momentum=0.9),
    "SGD without momentum": lambda groups: torch.optim.SGD(groups),
    "Lion": lambda groups: Lion(groups, 0.1, (0.9, 0.99), 0.1),
    "NAdam": lambda groups: torch.optim.NAdam(groups),  # has a second scalar, mu_product
    "BlockAdam8bit": lambda groups: BlockAdam8bit(groups),
    "Factored": lambda groups: Factored(groups),
    "Adagrad": lambda groups: torch.optim.Adagrad(groups),  # has state from the start
}


def steps(optimizer: torch.optim.Optimizer, pair: tuple[nn.Parameter, nn.Parameter], first: int, number: int) -> None:
    for step in range(first, first + number):
        for param in pair:
            param.grad = torch.full_like(param, 0.1 * (step + 1))
        optimizer.step()


def slots_of(pair: tuple[nn.Parameter, nn.Parameter]) -> list[Slot]:
    return [whole("weight", pair[0]), whole("bias", pair[1])]


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_a_fresh_optimizer_continues_bit_for_bit(build: Any) -> None:
    pair = params()
    optimizer = build(groups(*pair))
    steps(optimizer, pair, 0, 3)
    saved = fragments(slots_of(pair), optimizer)
    stored: dict[str, dict[str, Tensor]] = {}
    for fragment in saved:
        stored.setdefault(fragment.tensor.name, {})[fragment.tensor.key] = fragment.tensor
    by_name: dict[str, dict[str, Scalar]] = {}
    for scalar in scalars(slots_of(pair), optimizer):
        for name in scalar.names:
            by_name.setdefault(name, {})[scalar.key] = scalar

    other = (nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(())))
    again = build(groups(*other))
    targets, notes = create_states(slots_of(other), again, stored, by_name, steps=3)
    values = {(fragment.tensor.name, fragment.tensor.key): fragment.view.clone() for fragment in saved}
    assert {(target.tensor.name, target.tensor.key) for target in targets} == set(values)
    with torch.no_grad():
        for target in targets:
            target.view.copy_(values[target.tensor.name, target.tensor.key])
    assert notes == []
    steps(optimizer, pair, 3, 3)
    steps(again, other, 3, 3)
    assert all(torch.equal(one, two) for one, two in zip(pair, other, strict=True))


class DeepSpeedCPULion(Lion):
    """Has the habits of DeepSpeed's, by its name: an int step, and a second moment that it never reads."""

    __module__ = "deepspeed.ops.lion.cpu_lion"


class AdamW(BlockAdam8bit):
    """Somebody else's, as bitsandbytes has one that keeps codes."""


def test_the_habits_of_an_optimizer_are_not_those_of_another_with_its_name() -> None:
    pair = params()
    check_kind(AdamW(groups(*pair)), {"class": "AdamW", "kind": "AdamW"})
    with pytest.raises(CheckpointError, match="the one cannot continue the other"):
        check_kind(AdamW(groups(*pair)), {"class": "AdamW", "kind": "adam"})


def test_the_step_is_what_the_implementation_wants() -> None:
    pair = params()
    stored = {
        name: {"exp_avg": Tensor(name, "exp_avg", "float32", shape)} for name, shape in (("weight", (4, 3)), ("bias", ()))
    }
    step = {name: {"step": Scalar("step", "float32", 5.0, (name,))} for name in stored}
    counting = DeepSpeedCPULion(groups(*pair), 0.1, (0.9, 0.99), 0.1)
    create_states(slots_of(pair), counting, stored, step, steps=9)
    assert counting.state[pair[0]]["step"] == 5
    assert isinstance(counting.state[pair[0]]["step"], int)
    create_states(slots_of(pair), counting, stored, {}, steps=9)
    assert counting.state[pair[0]]["step"] == 9, "the checkpoint's optimizer did not count"
    plain = Lion(groups(*pair), 0.1, (0.9, 0.99), 0.1)
    create_states(slots_of(pair), plain, stored, step, steps=9)
    assert set(plain.state[pair[0]]) == {"exp_avg"}
    adam = torch.optim.AdamW(groups(*pair))
    create_states(slots_of(pair), adam, stored, step, steps=9)
    assert torch.equal(adam.state[pair[0]]["step"], torch.tensor(5.0))


def test_states_that_are_never_read_are_not_stored() -> None:
    pair = params()
    lion = DeepSpeedCPULion(groups(*pair), 0.1, (0.9, 0.99), 0.1)
    steps(lion, pair, 0, 1)
    lion.state[pair[0]]["exp_avg_sq"] = torch.zeros(4, 3)
    assert {fragment.tensor.key for fragment in fragments(slots_of(pair), lion)} == {"param", "exp_avg"}


def test_parameters_that_share_a_partition_share_a_step() -> None:
    flat = nn.Parameter(torch.zeros(8))
    members = [Slot("a", (3,), 0, 3, flat, 0, flat, False), Slot("b", (5,), 0, 5, flat, 3, flat, False)]
    adam = torch.optim.AdamW([flat])
    stored = {"a": {"exp_avg": Tensor("a", "exp_avg", "float32", (3,))}, "b": {"param": Tensor("b", "param", "float32", (5,))}}
    step = {"a": {"step": Scalar("step", "float32", 4.0, ("a",))}, "b": {"step": Scalar("step", "float32", 2.0, ("b",))}}
    adam.state[flat]["exp_avg"] = torch.ones(8)
    targets, notes = create_states(members, adam, stored, step, steps=4)
    assert [(target.tensor.name, target.tensor.key) for target in targets] == [("a", "param"), ("b", "param"), ("a", "exp_avg")]
    assert float(adam.state[flat]["step"]) == 4
    assert adam.state[flat]["exp_avg"].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    assert len(notes) == 2
    assert "b was 2: parameters that share a partition now share 4" in notes[0]
    assert "b had no exp_avg in the checkpoint" in notes[1]


def test_a_tensor_that_is_not_contiguous_is_refused() -> None:
    with pytest.raises(CheckpointError, match="w is not contiguous"):
        view_of(whole("w", torch.zeros(2, 3)), torch.zeros(3, 2).t())


def test_every_group_gets_its_own_hyper_parameters_by_name() -> None:
    optimizer = torch.optim.AdamW(groups(*params()), betas=(0.8, 0.9), fused=False)
    stored = hyper_parameters(optimizer)
    assert stored["decay"]["betas"] == [0.8, 0.9]
    assert {"params", "name", "fused", "foreach"}.isdisjoint(stored["decay"])
    other = torch.optim.AdamW(groups(*params())[::-1], foreach=True)
    other.param_groups[0]["lr"] = torch.tensor(9.0)
    set_hyper_parameters(other, {name: {**settings, "unknown": 1} for name, settings in stored.items()})
    no_decay, decay = other.param_groups
    assert (no_decay["weight_decay"], decay["weight_decay"], decay["lr"]) == (0.0, 0.1, 0.3)
    assert torch.equal(no_decay["lr"], torch.tensor(0.2))
    assert decay["betas"] == (0.8, 0.9)
    assert decay["foreach"] is True
    assert "unknown" not in decay


def test_settings_that_are_not_json_are_left_out() -> None:
    optimizer = torch.optim.SGD(groups(*params()))
    optimizer.param_groups[0] |= {"hook": print, "mixed": [1, print], "_private": 1}
    assert {"hook", "mixed", "_private"}.isdisjoint(hyper_parameters(optimizer)["decay"])


def test_other_groups_and_other_optimizers_are_refused() -> None:
    optimizer = torch.optim.AdamW(groups(*params()))
    check_groups(optimizer, {"decay": {}, "no_decay": {}})
    with pytest.raises(CheckpointError, match="param groups all, this run has decay, no_decay"):
        check_groups(optimizer, {"all": {}})
    check_groups(optimizer, {})  # imported: the run has its own
    before = hyper_parameters(optimizer)
    set_hyper_parameters(optimizer, {})
    assert hyper_parameters(optimizer) == before
    check_kind(optimizer, {"class": "none", "kind": "none"})
    check_kind(optimizer, {"class": "DeepSpeedCPUAdam", "kind": "adam"})
    with pytest.raises(CheckpointError, match="state of Lion, this run has AdamW"):
        check_kind(optimizer, {"class": "Lion", "kind": "lion"})
