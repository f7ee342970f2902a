"""What optimizers keep beside the parameters, and how each wants it back.

Tensor states go by the optimizer's own names; scalar states are numbers or tensors of no dims, and the implementations of one
optimizer disagree about which: torch's AdamW wants `step` as a tensor, DeepSpeed's CPU Adam as an int. A freshly built
optimizer has no state before its first step; it is created here as the optimizer would, without taking a step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from anyshard.configs.errors import CheckpointError
from anyshard.trainer.checkpoint.layout import Fragment, Slot, param_fragment, state_fragment
from anyshard.trainer.checkpoint.manifest import PARAM, Scalar, Tensor
from anyshard.trainer.checkpoint.partitions import (
    by_owner,
    has_partitions,
    is_torn,
    is_whole,
    name_of,
    own_fragment,
    stored_whole,
)

Number = int | float
# Settings that choose an implementation, or that name things: they stay as the run that restores has them.
_NOT_HYPER_PARAMETERS = frozenset({"params", "param_names", "name", "foreach", "fused", "capturable", "differentiable"})


@dataclass(frozen=True)
class Habits:
    """How one implementation keeps its state.

    Attributes:
        kind: implementations of the same kind can continue each other's states.
        step: "tensor" or "int"; "none" when it keeps no step; "as stored" for an optimizer that is not known here.
        unused: states that it allocates and never reads.
    """

    kind: str
    step: str
    unused: frozenset[str] = frozenset()


_HABITS = {
    "torch.AdamW": Habits("adam", "tensor"),
    "torch.Adam": Habits("adam", "tensor"),
    "deepspeed.FusedAdam": Habits("adam", "int"),
    "deepspeed.DeepSpeedCPUAdam": Habits("adam", "int"),
    "anyshard.Lion": Habits("lion", "none"),
    "deepspeed.FusedLion": Habits("lion", "int"),
    # allocated and never read: deepspeed 0.19.8 ops/lion/cpu_lion.py:124
    "deepspeed.DeepSpeedCPULion": Habits("lion", "int", frozenset({"exp_avg_sq"})),
    "torch.SGD": Habits("sgd", "none"),
    "anyshard.Adagrad": Habits("adagrad", "none"),
}


def habits_of(optimizer: torch.optim.Optimizer) -> Habits:
    """Habits by package and class name (others have an AdamW too); an optimizer that is not known is taken at its word."""
    kind = type(optimizer)
    package = kind.__module__.partition(".")[0]
    return _HABITS.get(f"{package}.{kind.__name__}", Habits(kind.__name__, "as stored"))


def fragments(slots: Iterable[Slot], optimizer: torch.optim.Optimizer, *, position: str = "") -> list[Fragment]:
    """Live views of every slot's value and of its optimizer states.

    Where a state has another shape than what it belongs to, all states of that are taken whole (`partitions.py`).

    Args:
        position: of this rank, from `layout.position`.
    """
    slots = list(slots)
    last = {id(owner): (owner, members) for owner, members in by_owner(slots)}
    found = []
    for slot in slots:
        found.append(param_fragment(slot))
        if slot.owner is None:
            continue
        states = _tensor_states(slot.owner, optimizer)
        if all(value.shape == slot.owner.shape for value in states.values()):
            found += [state_fragment(slot, key, value) for key, value in states.items()]
        elif last[id(slot.owner)][1][-1] is slot:
            name = name_of(*last[id(slot.owner)], position)
            found += [own_fragment(name, key, value, slot) for key, value in states.items()]
    return found


def _tensor_states(owner: torch.Tensor, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    unused = habits_of(optimizer).unused
    return {
        key: value
        for key, value in optimizer.state.get(owner, {}).items()
        if key not in unused and isinstance(value, torch.Tensor) and not _is_scalar(key, value, owner)
    }


def left_out(optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of states that are neither tensors nor numbers: they are not stored."""
    kinds = (torch.Tensor, int, float, type(None))
    return sorted({key for state in optimizer.state.values() for key, value in state.items() if not isinstance(value, kinds)})


def _is_scalar(key: str, value: torch.Tensor, owner: torch.Tensor) -> bool:
    return value.dim() == 0 and (key == "step" or owner.dim() > 0)


def scalars(slots: Iterable[Slot], optimizer: torch.optim.Optimizer, *, position: str = "") -> list[Scalar]:
    """Scalar states of this rank's parameters, those of equal value together."""
    return scalars_of(owners(slots, optimizer, position=position), optimizer)


def owners(
    slots: Iterable[Slot], optimizer: torch.optim.Optimizer, *, position: str = ""
) -> list[tuple[torch.Tensor, tuple[str, ...]]]:
    """What the optimizer steps, and the names that its scalar states go by: those of the parameters in it.

    The partition's own name as well for an optimizer that is not known here: its partitions may differ in their scalars.
    """
    found = []
    for owner, members in by_owner(slots):
        names = [slot.name for slot in members]
        if any(value.shape != owner.shape for value in _tensor_states(owner, optimizer).values()):
            names = [name_of(owner, members, position)]
        elif habits_of(optimizer).step == "as stored" and not is_whole(owner, members):
            names.append(name_of(owner, members, position))
        found.append((owner, tuple(names)))
    return found


def scalars_of(owners: Iterable[tuple[torch.Tensor, Iterable[str]]], optimizer: torch.optim.Optimizer) -> list[Scalar]:
    """The same, from what the optimizer steps and the parameters in each."""
    names: dict[tuple[str, str, Number], list[str]] = defaultdict(list)
    for owner, members in owners:
        for key, value in optimizer.state.get(owner, {}).items():
            if isinstance(value, torch.Tensor):
                if _is_scalar(key, value, owner):
                    names[key, str(value.dtype).removeprefix("torch."), value.item()].extend(members)
            elif isinstance(value, int | float):
                names[key, "float" if isinstance(value, float) else "int", value].extend(members)
    return [Scalar(key, kind, value, tuple(members)) for (key, kind, value), members in names.items()]


@torch.no_grad()
def create_states(
    slots: Iterable[Slot],
    optimizer: torch.optim.Optimizer,
    stored: Mapping[str, Mapping[str, Tensor]],
    stored_scalars: Mapping[str, Mapping[str, Scalar]],
    *,
    steps: int,
    position: str = "",
) -> tuple[list[Fragment], list[str]]:
    """Give every parameter the states that the checkpoint has for it, ready to be written into.

    A state that exists is kept (its memory is written over), others are created as zeros. What belongs to a partition that
    this layout does not have is left as the optimizer made it.

    Args:
        stored: name -> state key -> tensor in the checkpoint.
        stored_scalars: name -> state key -> scalar.
        steps: steps that the optimizer took; for one that counts them, when the checkpoint's did not.
        position: of this rank, from `layout.position`.

    Returns:
        Fragments to fill, and notes on what cannot be as it was.
    """
    habits = habits_of(optimizer)
    group_of = {id(param): group for group in optimizer.param_groups for param in group["params"]}
    slots, some_elsewhere = list(slots), has_partitions(stored)
    targets, notes, fresh = [param_fragment(slot) for slot in slots], [], []
    for owner, members in by_owner(slots):
        before = dict(optimizer.state.get(owner, {}))
        # a ZeRO-3 group is empty between steps; its parameters share the device of the first group's
        group = group_of.get(id(owner), optimizer.param_groups[0])
        if own := stored_whole(owner, members, stored, position):
            name, tensors = own
            held = {tensor.key: _own_tensor(before.get(tensor.key), tensor, owner) for tensor in tensors}
            values = _restored_scalars(stored_scalars.get(name, {}), habits, owner, group, steps)
            optimizer.state[owner] = {**held, **values}
            targets += [own_fragment(name, key, value, members[0]) for key, value in held.items()]
            continue
        if is_torn(members, stored, some_elsewhere=some_elsewhere):
            fresh += [slot.name for slot in members]
            continue
        dtypes = {
            key: tensor.dtype
            for slot in members
            for key, tensor in stored[slot.name].items()
            if key != PARAM and key not in habits.unused
        }
        keys = list(dtypes)
        state: dict[str, Any] = {
            key: _state_tensor(before.get(key), owner, dtype if habits.step == "as stored" else None)
            for key, dtype in dtypes.items()
        }
        found, more = _merge_scalars(members, stored_scalars)
        exact = stored_scalars.get(name_of(owner, members, position))
        if exact is None:
            notes += more
        if keys or found:
            state |= _restored_scalars(exact or found, habits, owner, group, steps)
        optimizer.state[owner] = state
        for slot in members:
            here = [key for key in keys if key in stored[slot.name]]
            targets += [state_fragment(slot, key, state[key]) for key in here]
            missing = sorted(set(keys) - set(here))
            if missing:
                notes.append(f"{slot.name} had no {', '.join(missing)} in the checkpoint: zeros, as for a new parameter")
                for key in missing:
                    state_fragment(slot, key, state[key]).view.zero_()
    return targets, notes + _fresh_notes(fresh)


def _state_tensor(before: Any, owner: torch.Tensor, dtype: str | None) -> torch.Tensor:
    """Memory for a state: what is there, or zeros of the stored dtype (None: of the parameter's)."""
    if isinstance(before, torch.Tensor) and before.shape == owner.shape:
        return before
    kind = owner.dtype if dtype is None else getattr(torch, dtype)
    return torch.zeros_like(owner, dtype=kind, memory_format=torch.preserve_format, requires_grad=False)


def _own_tensor(before: Any, stored: Tensor, owner: torch.Tensor) -> torch.Tensor:
    """Memory for a state in its own shape: what is there if it is the same, or zeros."""
    dtype = getattr(torch, stored.dtype)
    if isinstance(before, torch.Tensor) and tuple(before.shape) == stored.shape and before.dtype == dtype:
        return before
    return torch.zeros(stored.shape, dtype=dtype, device=owner.device)


def _fresh_notes(names: list[str]) -> list[str]:
    names = list(dict.fromkeys(names))
    if not names:
        return []
    listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return [
        f"the optimizer's state of {listed} starts afresh: the checkpoint has it in shapes that belong to "
        "other partitions (another layout wrote it)"
    ]


def _merge_scalars(members: list[Slot], stored: Mapping[str, Mapping[str, Scalar]]) -> tuple[dict[str, Scalar], list[str]]:
    """Scalars of parameters that share one flat tensor here; where they differ the largest is taken, and said."""
    merged: dict[str, Scalar] = {}
    notes = []
    for slot in members:
        for key, scalar in stored.get(slot.name, {}).items():
            other = merged.setdefault(key, scalar)
            if scalar.value != other.value:
                merged[key] = max(scalar, other, key=lambda each: each.value)
                shared = f"parameters that share a partition now share {merged[key].value:g}"
                notes.append(f"{key} of {slot.name} was {scalar.value:g}: {shared}")
    return merged, notes


def _restored_scalars(
    stored: Mapping[str, Scalar], habits: Habits, owner: torch.Tensor, group: Mapping[str, Any], steps: int
) -> dict[str, Any]:
    values: dict[str, Any] = {key: _as_stored(scalar) for key, scalar in stored.items() if key != "step"}
    count = stored["step"].value if "step" in stored else steps
    if habits.step == "int":
        values["step"] = int(count)
    elif habits.step == "tensor":
        # torch/optim/adam.py: on the parameter's device for capturable and fused implementations, else on the CPU
        device = owner.device if group.get("capturable") or group.get("fused") else torch.device("cpu")
        values["step"] = torch.tensor(float(count), dtype=torch.float32, device=device)
    elif habits.step == "as stored" and "step" in stored:
        values["step"] = _as_stored(stored["step"])
    return values


def _as_stored(scalar: Scalar) -> Any:
    if scalar.kind in ("int", "float"):
        return int(scalar.value) if scalar.kind == "int" else float(scalar.value)
    return torch.tensor(scalar.value, dtype=getattr(torch, scalar.kind))


def replay_bias_correction(optimizer: Any) -> None:
    """At the end of a restore bring DeepSpeedCPUAdam's running powers of beta to where the steps taken so far left them.

    The C++ optimizer multiplies beta^t up step by step, in float, and would start from pow(beta, t) after a restore: a last-bit
    difference, and the run would not be the uninterrupted one. One element is stepped for every step that was taken. For other
    optimizers this does nothing.
    Source: deepspeed 0.19.8 csrc/includes/cpu_adam.h:71, IncrementStep.
    """
    update = getattr(getattr(optimizer, "ds_opt_adam", None), "adam_update", None)
    steps = max((state.get("step", 0) for state in optimizer.state.values()), default=0)
    if update is None:
        return
    betas = list(dict.fromkeys(tuple(group["betas"]) for group in optimizer.param_groups))
    param, grad, exp_avg, exp_avg_sq = (torch.zeros(1) for _ in range(4))
    for step in range(1, steps + 1):
        for beta1, beta2 in betas:
            update(optimizer.opt_id, step, 0.0, beta1, beta2, 1.0, 0.0, True, param, grad, exp_avg, exp_avg_sq)


def group_name(group: Mapping[str, Any], number: int) -> str:
    """Name of a param group; its number where it has none."""
    return str(group.get("name", f"group{number}"))


def hyper_parameters(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """Group name -> every hyper-parameter of the group, as JSON."""
    found = {}
    for number, group in enumerate(optimizer.param_groups):
        settings = {key: _to_json(value) for key, value in group.items() if key not in _NOT_HYPER_PARAMETERS and key[0] != "_"}
        found[group_name(group, number)] = {key: value for key, value in settings.items() if value is not NotImplemented}
    return found


def _to_json(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        items = [_to_json(item) for item in value]
        return NotImplemented if any(item is NotImplemented for item in items) else items
    return NotImplemented


def set_hyper_parameters(optimizer: torch.optim.Optimizer, stored: Mapping[str, Mapping[str, Any]]) -> None:
    """Give every group its own stored hyper-parameters, found by the group's name; what only one side has stays."""
    names = [group_name(group, number) for number, group in enumerate(optimizer.param_groups)]
    for name, group in zip(names, optimizer.param_groups, strict=True):
        for key, value in stored.get(name, {}).items():
            if key not in group or key in _NOT_HYPER_PARAMETERS:
                continue
            if isinstance(group[key], torch.Tensor):
                group[key].fill_(value)
            else:
                group[key] = tuple(value) if isinstance(group[key], tuple) else value


def check_kind(optimizer: torch.optim.Optimizer, stored: Mapping[str, Any]) -> None:
    """Refuse the states of another optimizer; a checkpoint without states suits every optimizer.

    Raises:
        CheckpointError: the checkpoint was written by an optimizer of another kind.
    """
    kind = habits_of(optimizer).kind
    if stored.get("kind") not in ("none", kind):
        raise CheckpointError(
            f"The checkpoint holds the state of {stored.get('class')}, this run has {type(optimizer).__name__}: "
            "the one cannot continue the other. Set the optimizer of the checkpoint, or resume=never to start anew."
        )


def check_groups(optimizer: torch.optim.Optimizer, stored: Mapping[str, Any]) -> None:
    """Refuse other param groups; a checkpoint of another format has none, and leaves them to the run.

    Raises:
        CheckpointError: the groups are not those of the checkpoint.
    """
    names = {group_name(group, number) for number, group in enumerate(optimizer.param_groups)}
    if stored and names != set(stored):
        raise CheckpointError(
            f"The checkpoint has the param groups {', '.join(sorted(stored))}, this run has {', '.join(sorted(names))}: "
            "they must be the same. Build the optimizer's groups as the checkpoint's run did."
        )
