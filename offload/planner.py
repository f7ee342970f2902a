"""The fastest place for state that fits: candidates with their memory and step time, and why each loser lost. Pure.

A step takes what computing takes, and on top what moving state takes that nothing hides. Rates are those of the probe
(`measured.py`), so that figures are of this machine; where none was made they are those of a data sheet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from anyshard.offload.measured import Rates

FP32_BYTES = 4
GIB = 2**30


@dataclass(frozen=True)
class Work:
    """What a step of one rank does, whatever the placement.

    Attributes:
        compute_s: forward and backward passes of all micro-batches.
        elements: of this rank's optimizer state: those of its part of the parameters.
        part_bytes: of this rank's part of the weights.
        micro_steps: forward and backward passes of a step.
        num_states: tensors that the optimizer keeps beside the master.
        ranks_per_drive: that share a drive's rate.
    """

    compute_s: float
    elements: int
    part_bytes: int
    micro_steps: int
    num_states: int
    ranks_per_drive: int = 1


@dataclass(frozen=True)
class Candidate:
    """A placement that was looked at.

    Attributes:
        name: as `offload=` takes it.
        parts: seconds of a step by what takes them.
        needs: bytes of one rank on device, host and drive.
        refusal: why its settings cannot be had; "" where they can.
    """

    name: str
    optimizer: str
    param: str
    needs: dict[str, float]
    parts: dict[str, float] = field(default_factory=dict)
    refusal: str = ""

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Choice:
    """What was chosen, and what was not.

    Attributes:
        best: None where nothing fits.
        lost: name -> why, for the others.
    """

    best: Candidate | None
    candidates: list[Candidate]
    lost: dict[str, str]

    def lines(self) -> list[str]:
        """A table for people."""
        rows = []
        for each in self.candidates:
            needs = ", ".join(f"{place} {size / GIB:.2f} GiB" for place, size in each.needs.items() if size)
            verdict = "chosen" if each is self.best else f"not taken: {self.lost[each.name]}"
            time = "" if each.refusal else f"{each.step_s:.3g} s a step ({_told(each.parts)}); "
            rows.append(f"offload={each.name}: {time}{needs or 'no memory counted'}; {verdict}")
        return rows


def _told(parts: dict[str, float]) -> str:
    return ", ".join(f"{what} {seconds:.3g}" for what, seconds in parts.items() if seconds)


def step_parts(work: Work, rates: Rates, *, optimizer: str, param: str, overlap: str) -> dict[str, float]:
    """Seconds of one step by what takes them.

    Args:
        optimizer, param: tiers.
        overlap: `offload.overlap`.
    """
    parts = {"compute": work.compute_s}
    bus = rates.device_copy_bytes_per_s  # without an accelerator nothing crosses a bus
    read, write = (rate / work.ranks_per_drive for rate in (rates.read_bytes_per_s, rates.write_bytes_per_s))
    if optimizer != "none":
        stepping = work.elements / rates.adam_elements_per_s
        crossing = 2 * work.part_bytes / bus if bus else 0.0  # gradients there, weights back
        if optimizer == "nvme":
            state = FP32_BYTES * work.elements * (work.num_states + 1)
            parts["optimizer"] = _overlapped(stepping, state / read, state / write, overlap)
        else:
            parts["optimizer"] = stepping
        parts["gradients and weights"] = crossing
    # every part is fetched once for a forward and once for a backward pass
    fetches = 2 * work.micro_steps * work.part_bytes
    if param == "nvme":
        parts["parameters"] = fetches / read + work.part_bytes / write
    elif param == "cpu" and bus:
        parts["parameters"] = max(0.0, fetches / bus - work.compute_s)  # fetched ahead, beside computing
    return parts


def _overlapped(stepping: float, reading: float, writing: float, overlap: str) -> float:
    """A drive does one thing at a time, and what overlaps hides behind the longer."""
    return {
        "none": stepping + reading + writing,
        "read": max(stepping, reading) + writing,
        "write": max(stepping, writing) + reading,
        "both": max(stepping, reading + writing),
    }[overlap]


def choose(candidates: Sequence[Candidate], limits: dict[str, float]) -> Choice:
    """The fastest candidate whose needs fit; of equals the first.

    Args:
        limits: bytes that one rank has, by place; a place that is not named has no limit.
    """
    lost: dict[str, str] = {}
    fitting = []
    for each in candidates:
        short = [place for place, size in each.needs.items() if size > limits.get(place, float("inf"))]
        if each.refusal:
            lost[each.name] = each.refusal
        elif short:
            place = short[0]
            lost[each.name] = f"{each.needs[place] / GIB:.2f} GiB on the {place}, where there are {limits[place] / GIB:.2f}"
        else:
            fitting.append(each)
    best = min(fitting, key=lambda each: each.step_s, default=None)
    for each in fitting:
        if best is not None and each is not best:
            slower = each.step_s / best.step_s - 1 if best.step_s else 0.0
            same = f"no faster than offload={best.name}, which moves less"
            lost[each.name] = f"{100 * slower:.0f} % slower" if slower > 0.005 else same
    return Choice(best, list(candidates), lost)
