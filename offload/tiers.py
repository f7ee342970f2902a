"""The tiers that optimizer state and parameters can live in beside the device: what each needs, gives DeepSpeed and costs.

A tier is one file with a class of this protocol, and a line in `tiers()`; `tests/conformance/test_tiers.py` takes every
member through it. Nothing here imports torch: the planner asks as well as the ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from anyshard.configs import schema
from anyshard.configs.errors import Problem
from anyshard.offload.derive import Aio


@dataclass(frozen=True)
class Parts:
    """One rank's parts of a model, as ZeRO-3 cuts it.

    Attributes:
        names: parameter -> elements of the part, in the order of the model.
        groups: of the trained ones, by param group of the optimizer.
        num_states: fp32 tensors that the optimizer keeps beside the master.
        element_bytes: of the type that the model computes in.
    """

    names: dict[str, int]
    groups: list[list[int]]
    dp: int
    num_states: int
    element_bytes: int


@dataclass(frozen=True)
class TierBytes:
    """What one rank's state takes in a tier.

    Attributes:
        host: in memory, page-locked buffers included.
        pinned: of those, the page-locked ones.
        nvme: in swap files.
    """

    host: int = 0
    pinned: int = 0
    nvme: int = 0

    def __add__(self, other: TierBytes) -> TierBytes:
        return TierBytes(self.host + other.host, self.pinned + other.pinned, self.nvme + other.nvme)


@dataclass(frozen=True)
class Fragment:
    """A part of DeepSpeed's configuration, and what it costs.

    Attributes:
        zero: keys of `zero_optimization`.
        top: keys beside it.
    """

    zero: dict[str, Any] = field(default_factory=dict)
    top: dict[str, Any] = field(default_factory=dict)
    bytes: TierBytes = field(default_factory=TierBytes)


class Tier(Protocol):
    """Where state can live.

    Attributes:
        name: value of `offload.optimizer` and `offload.param`.
    """

    name: str

    def lack(self, config: schema.Config) -> Problem | None:
        """What keeps the tier from working on this machine and how to mend it; None where it works."""

    def optimizer(self, config: schema.Config, parts: Parts, *, folder: str, aio: Aio) -> Fragment:
        """For masters and optimizer states.

        Raises:
            ConfigError: the settings cannot hold this model's parts.
        """

    def param(self, config: schema.Config, parts: Parts, *, folder: str, aio: Aio) -> Fragment:
        """For parameters between uses. Raises ConfigError as `optimizer`."""


def tiers() -> dict[str, Tier]:
    """Every tier by name."""
    from anyshard.offload.tier_cpu import CpuTier
    from anyshard.offload.tier_nvme import NvmeTier

    members: Sequence[Tier] = (CpuTier(), NvmeTier())
    return {tier.name: tier for tier in members}


def lacks(config: schema.Config) -> Iterator[Problem]:
    """What keeps the chosen tiers from working on this machine."""
    members = tiers()
    for name in dict.fromkeys((config.offload.optimizer.value, config.offload.param.value)):
        problem = members[name].lack(config) if name in members else None
        if problem is not None:
            yield problem


def uses_nvme(config: schema.Config) -> bool:
    """Whether anything of the run lives on NVMe."""
    return schema.Device.nvme in (config.offload.optimizer, config.offload.param)


def fragment(config: schema.Config, parts: Parts, *, folder: str, aio: Aio) -> Fragment:
    """Of all chosen tiers together.

    Args:
        folder: of this rank's swap files.

    Raises:
        ConfigError: the settings cannot hold this model's parts.
    """
    members, found = tiers(), []
    if config.offload.optimizer.value in members:
        found.append(members[config.offload.optimizer.value].optimizer(config, parts, folder=folder, aio=aio))
    if config.offload.param.value in members:
        found.append(members[config.offload.param.value].param(config, parts, folder=folder, aio=aio))
    zero: dict[str, Any] = {}
    for each in found:
        sizes = [fragment["sub_group_size"] for fragment in (zero, each.zero) if "sub_group_size" in fragment]
        zero |= each.zero
        if sizes:
            zero["sub_group_size"] = min(sizes)
    top = {key: value for each in found for key, value in each.top.items()}
    return Fragment(zero, top, sum((each.bytes for each in found), TierBytes()))


def complete(ds_config: dict[str, Any], fragment: Fragment, extra: dict[str, Any]) -> None:
    """Put what tiers derived into DeepSpeed's configuration; keys of `deepspeed_extra` stay."""
    ours = {**copy.deepcopy(fragment.top), "zero_optimization": copy.deepcopy(fragment.zero)}
    _merge(ds_config, ours, extra)


def _merge(target: dict[str, Any], ours: dict[str, Any], extra: Any) -> None:
    for key, value in ours.items():
        theirs = extra.get(key) if isinstance(extra, dict) else None
        if isinstance(value, dict):
            _merge(target.setdefault(key, {}), value, theirs)
        elif theirs is None:
            target[key] = value
