"""Optimizer states of other shapes than their parameter's, in partitions: exact on the same layout, never mixed on another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.optimizers import BLOCK, BlockAdam8bit, Factored
from torch import nn

from anyshard.trainer.checkpoint.layout import Fragment, Slot
from anyshard.trainer.checkpoint.manifest import Scalar, Tensor
from anyshard.trainer.checkpoint.optimizers import create_states, fragments, left_out, scalars
from anyshard.trainer.checkpoint.partitions import PREFIX, name_of

SHAPES = {"a": (12, 10), "b": (8, 10)}
Held = tuple[dict[tuple[str, str], torch.Tensor], dict[str, dict[str, Tensor]], dict[str, dict[str, Scalar]]]


def flat_slots(cuts: Sequence[int]) -> list[list[Slot]]:
    """The matrices laid end to end and cut into partitions of these sizes, as ZeRO 1 does."""
    found, begin = [], 0
    for size in cuts:
        flat, slots, offset = nn.Parameter(torch.linspace(-1, 1, size)), [], 0
        for name, shape in SHAPES.items():
            numel = shape[0] * shape[1]
            start, stop = max(begin - offset, 0), min(begin + size - offset, numel)
            if start < stop:
                slots.append(Slot(name, shape, start, stop - start, flat, offset + start - begin, flat, replicated=False))
            offset += numel
        found.append(slots)
        begin += size
    return found


def whole_slots() -> list[Slot]:
    made = {name: nn.Parameter(torch.linspace(-1, 1, shape[0] * shape[1]).view(shape)) for name, shape in SHAPES.items()}
    return [Slot(name, SHAPES[name], 0, param.numel(), param, 0, param, replicated=True) for name, param in made.items()]


def stepped(slots: list[Slot], kind: Any, steps: int = 3) -> torch.optim.Optimizer:
    made: torch.optim.Optimizer = kind([{"name": "all", "params": list(dict.fromkeys(slot.owner for slot in slots))}])
    step(made, range(steps))
    return made


def step(optimizer: torch.optim.Optimizer, steps: range) -> None:
    for number in steps:
        for param in optimizer.param_groups[0]["params"]:
            param.grad = torch.sin(torch.arange(param.numel()) * (number + 1.0)).view(param.shape)
        optimizer.step()


def held(parts: Sequence[tuple[list[Slot], torch.optim.Optimizer]], position: str = "") -> Held:
    """What a checkpoint has of these ranks."""
    values, tensors, numbers = {}, {}, {}
    for slots, optimizer in parts:
        for fragment in fragments(slots, optimizer, position=position):
            key = (fragment.tensor.name, fragment.tensor.key)
            whole = values.setdefault(key, torch.zeros(fragment.tensor.numel, dtype=fragment.view.dtype))
            whole[fragment.start : fragment.start + fragment.numel] = fragment.view
            tensors.setdefault(key[0], {})[key[1]] = fragment.tensor
        for scalar in scalars(slots, optimizer, position=position):
            for name in scalar.names:
                numbers.setdefault(name, {})[scalar.key] = scalar
    return values, tensors, numbers


def restore(slots: list[Slot], optimizer: torch.optim.Optimizer, source: Held, position: str = "") -> list[str]:
    values, tensors, numbers = source
    targets, notes = create_states(slots, optimizer, tensors, numbers, steps=3, position=position)
    fill(targets, values)
    return notes


@torch.no_grad()
def fill(targets: list[Fragment], values: dict[tuple[str, str], torch.Tensor]) -> None:
    for target in targets:
        source = values[target.tensor.name, target.tensor.key]
        assert target.view.dtype == source.dtype
        target.view.copy_(source[target.start : target.start + target.numel])


def fresh(slots: list[Slot], kind: Any) -> torch.optim.Optimizer:
    made: torch.optim.Optimizer = kind([{"name": "all", "params": list(dict.fromkeys(slot.owner for slot in slots))}])
    return made


@pytest.mark.parametrize("kind", [BlockAdam8bit, Factored])
def test_the_same_partitions_go_on_bit_for_bit(kind: Any) -> None:
    """Also where two partitions of one parameter differ in a scalar."""
    ranks = [(slots, stepped(slots, kind, 3)) for slots in flat_slots([70, 130])]
    source = held(ranks)
    for slots, (_, before) in zip(flat_slots([70, 130]), ranks, strict=True):
        again = fresh(slots, kind)
        assert restore(slots, again, source) == []
        owner, theirs = slots[0].owner, before.param_groups[0]["params"][0]
        assert owner is not None
        assert set(again.state[owner]) == set(before.state[theirs])
        for key, value in before.state[theirs].items():
            mine = again.state[owner][key]
            assert type(mine) is type(value)
            assert torch.equal(torch.as_tensor(mine), torch.as_tensor(value))
        step(again, range(3, 5))
        step(before, range(3, 5))
        assert torch.equal(owner, theirs)


def test_scales_of_blocks_are_stored_under_the_partition() -> None:
    ((slots,)) = flat_slots([200])
    values, tensors, _ = held([(slots, stepped(slots, BlockAdam8bit))])
    assert {key for name, key in values if name in SHAPES} == {"param"}, "codes without their scales mean nothing"
    (name,) = (name for name in tensors if name.startswith(PREFIX))
    assert {key: tensor.shape for key, tensor in tensors[name].items()} == {
        "state1": (200,), "state2": (200,), "absmax1": (-(-200 // BLOCK),), "absmax2": (-(-200 // BLOCK),)
    }  # fmt: skip


@pytest.mark.parametrize("cuts", [[100, 100], [200], [70, 130]])
def test_other_partitions_start_afresh_and_say_so(cuts: list[int]) -> None:
    source = held([(slots, stepped(slots, BlockAdam8bit)) for slots in flat_slots([70, 130])], position="dp 2")
    for slots in flat_slots(cuts):
        again = fresh(slots, BlockAdam8bit)
        (note,) = restore(slots, again, source, position="dp 3")
        assert ", ".join(slot.name for slot in slots) in note
        assert "starts afresh" in note
        assert not again.state, "neither codes nor a step of which the rest is missing"
        owner = slots[0].owner
        assert owner is not None
        for slot in slots:
            part = owner.detach()[slot.offset : slot.offset + slot.numel]
            assert torch.equal(part, source[0][slot.name, "param"][slot.start : slot.start + slot.numel])


def test_whole_parameters_keep_their_own_shapes_and_do_not_follow_into_partitions() -> None:
    whole = whole_slots()
    source = held([(whole, stepped(whole, Factored))])
    assert {key: tensor.shape for key, tensor in source[1]["a"].items()} == {"param": (12, 10), "row": (12,), "col": (10,)}
    ((slots,)) = flat_slots([200])
    optimizer = fresh(slots, Factored)
    (note,) = restore(slots, optimizer, source)
    assert note.startswith("the optimizer's state of a, b starts afresh")
    assert not optimizer.state
    back = held([(slots, stepped(slots, Factored))])
    again = whole_slots()
    assert restore(again, fresh(again, Factored), back) == [], "one element for each element follows everywhere"


def test_eight_bit_codes_of_one_parameter_and_floats_of_another_do_not_share_a_partition() -> None:
    """Small tensors stay in fp32: in a common partition their states and the codes would not be of one kind."""
    ((slots,)) = flat_slots([200])
    stored = {
        "a": {"param": Tensor("a", "param", "float32", SHAPES["a"]), "state1": Tensor("a", "state1", "uint8", SHAPES["a"])},
        "b": {"param": Tensor("b", "param", "float32", SHAPES["b"]), "state1": Tensor("b", "state1", "float32", SHAPES["b"])},
    }
    optimizer = fresh(slots, BlockAdam8bit)
    _, notes = create_states(slots, optimizer, stored, {}, steps=3)
    assert len(notes) == 1
    assert not optimizer.state


def test_what_exists_is_written_over() -> None:
    whole = whole_slots()
    source = held([(whole, stepped(whole, Factored))])
    again = whole_slots()
    optimizer = stepped(again, Factored, 1)
    owner = again[0].owner
    assert owner is not None
    before = optimizer.state[owner]["row"]
    assert restore(again, optimizer, source) == []
    assert optimizer.state[owner]["row"] is before
    assert torch.equal(before, source[0]["a", "row"])


def test_a_partition_is_named_by_all_that_it_is() -> None:
    (slots,), (others,) = flat_slots([200]), flat_slots([190])
    assert slots[0].owner is not None
    assert others[0].owner is not None
    names = {
        name_of(slots[0].owner, slots, "dp 1"),
        name_of(slots[0].owner, slots, "dp 2"),
        name_of(slots[0].owner, slots[:1], "dp 1"),
        name_of(others[0].owner, others, "dp 1"),
    }
    assert len(names) == 4
    assert name_of(slots[0].owner, slots, "dp 1") in names


def test_states_that_are_neither_tensors_nor_numbers_are_known() -> None:
    whole = whole_slots()
    optimizer = stepped(whole, Factored)
    assert left_out(optimizer) == []
    optimizer.state[whole[0].owner]["history"] = [torch.zeros(3)]  # type: ignore[index]
    assert left_out(optimizer) == ["history"]
