"""How a model is divided into the stages of a pipeline: pure arithmetic on names and sizes, no torch.

What belongs to the first and the last stage comes from `stages.yaml`, by the model's type; decoder layers are dealt out so that
the largest stage is as small as can be, in equal numbers, or as `parallel.pp_layers` says.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from anyshard.configs.errors import Problem
from anyshard.configs.schema import Balance, Parallel

FILE = Path(__file__).parent / "stages.yaml"


@dataclass(frozen=True)
class Division:
    """Where a kind of model can be divided.

    Attributes:
        first: module that the first stage runs -> what later stages have in its place ("never", "zero", "same").
        layers: the list of decoder layers.
        last: module that the last stage runs -> what earlier stages have in its place.
    """

    first: dict[str, str]
    layers: str
    last: dict[str, str]

    def shared(self, tied: Mapping[str, str]) -> frozenset[str]:
        """Parameters of the first stage that the last one uses as well, of tied ones (other name -> first name)."""
        pairs = tied.items()
        return frozenset(name for other, name in pairs if (self.part_of(name), self.part_of(other)) == ("first", "last"))

    def part_of(self, name: str) -> int | str | None:
        """To what a parameter belongs: the number of a layer, "first", "last", or None for neither."""
        if name.startswith(f"{self.layers}."):
            return int(name[len(self.layers) + 1 :].partition(".")[0])
        for part, modules in (("first", self.first), ("last", self.last)):
            if any(name.startswith(f"{module}.") for module in modules):
                return part
        return None


def division_of(model_type: str) -> Division | None:
    """The entry of stages.yaml for a kind of model; None where there is none."""
    entries = yaml.safe_load(FILE.read_text())
    entry = entries.get(model_type)
    if entry is not None and "like" in entry:
        entry = entries[entry["like"]]
    return None if entry is None else Division(dict(entry["first"]), entry["layers"], dict(entry["last"]))


def known_types() -> list[str]:
    """Every kind of model that stages.yaml describes."""
    return sorted(yaml.safe_load(FILE.read_text()))


@dataclass(frozen=True)
class Stages:
    """The decoder layers of every stage, and the elements of its parameters.

    Attributes:
        bounds: stage s has the layers from `bounds[s]` to before `bounds[s + 1]`.
        sizes: elements on each stage; a parameter that the first and the last stage share counts on both.
    """

    division: Division
    bounds: tuple[int, ...]
    sizes: tuple[int, ...] = field(default=())

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline."""
        return len(self.bounds) - 1

    def layers(self, stage: int) -> range:
        """The decoder layers of a stage."""
        return range(self.bounds[stage], self.bounds[stage + 1])

    def stage_of(self, name: str) -> int:
        """The stage of a parameter; that of the first one for what several share."""
        part = self.division.part_of(name)
        if isinstance(part, int):
            return next(stage for stage in range(self.num_stages) if part in self.layers(stage))
        return self.num_stages - 1 if part == "last" else 0


@dataclass(frozen=True)
class Costs:
    """What each part of a model costs, in any unit: decoder layers, and what the first and the last stage have beside them."""

    layers: tuple[int, ...]
    first: int
    last: int


def parameter_costs(
    division: Division, params: Mapping[str, int], tied: Mapping[str, str], num_layers: int, *, multiplied: bool = False
) -> Costs:
    """Elements of the parameters.

    Args:
        multiplied: only of those that a token is multiplied with, as an estimate of time: embeddings are looked up.
    """
    layers, ends = [0] * num_layers, {"first": 0, "last": 0}
    for name, numel in params.items():
        part = division.part_of(name)
        if isinstance(part, int):
            layers[part] += numel
        elif part is not None:
            ends[part] += numel
    shared = sum(params[name] for name in division.shared(tied))
    return Costs(tuple(layers), 0 if multiplied else ends["first"], ends["last"] + shared)


def balanced(weights: Sequence[int], first: int, last: int, num_stages: int) -> tuple[int, ...]:
    """Bounds of contiguous runs of layers, none empty, whose heaviest is as light as can be.

    Args:
        weights: of each layer.
        first, last: what the first and the last stage have beside their layers.

    The later stages get the layer more where there is a choice: the first one keeps the activations of most micro-batches.
    """
    count = len(weights)
    assert 1 <= num_stages <= count, (num_stages, count)
    sums = [0]
    for weight in weights:
        sums.append(sums[-1] + weight)

    def load(start: int, stop: int, stage: int) -> int:
        more = (first if stage == 0 else 0) + (last if stage == num_stages - 1 else 0)
        return sums[stop] - sums[start] + more

    # best[stop]: (heaviest, bounds) of the first `stage + 1` stages over the layers before `stop`
    best: dict[int, tuple[int, tuple[int, ...]]] = {stop: (load(0, stop, 0), (0, stop)) for stop in range(1, count + 1)}
    for stage in range(1, num_stages):
        following: dict[int, tuple[int, tuple[int, ...]]] = {}
        for stop in range(stage + 1, count + 1):
            choices = [
                (max(best[start][0], load(start, stop, stage)), (*best[start][1], stop))
                for start in range(stage, stop)
                if start in best
            ]
            following[stop] = min(choices)
        best = following
    return best[count][1]


def plan_stages(
    division: Division,
    params: Mapping[str, int],
    tied: Mapping[str, str],
    parallel: Parallel,
    num_layers: int,
    times: Costs | None = None,
) -> Stages:
    """Divide a model; `stage_problems` must have found nothing.

    Args:
        params: elements of every parameter by name, a tied one once under its first name.
        tied: other name -> first name.
        times: measured, for `parallel.pp_balance=time`; None estimates them from the parameters.
    """
    sizes = parameter_costs(division, params, tied, num_layers)
    if parallel.pp_layers is not None:
        bounds = tuple(itertools.accumulate(parallel.pp_layers, initial=0))
    elif parallel.pp_balance is Balance.layers:
        bounds = balanced([1] * num_layers, 0, 0, parallel.pp)
    else:
        costs = sizes
        if parallel.pp_balance is Balance.time:
            costs = times or parameter_costs(division, params, tied, num_layers, multiplied=True)
        bounds = balanced(costs.layers, costs.first, costs.last, parallel.pp)
    loads = [sum(sizes.layers[start:stop]) for start, stop in itertools.pairwise(bounds)]
    loads[0] += sizes.first
    loads[-1] += sizes.last
    return Stages(division, bounds, tuple(loads))


def stage_problems(
    parallel: Parallel, names: Iterable[str], num_layers: int, model_name: str, model_type: str
) -> list[Problem]:
    """Why a model cannot be divided into `parallel.pp` stages.

    Args:
        names: of every parameter.
    """
    if parallel.pp == 1:
        return []
    division = division_of(model_type)
    if division is None:
        reason = f"nothing says how a model of type {model_type} ({model_name}) becomes stages."
        known = ", ".join(known_types())
        fix = (
            f"Set parallel.pp=1, or add an entry {model_type!r} to parallel/stages.yaml: what the first stage has, the list of "
            f"layers, what the last one has (docs/parallelism.md). There are: {known}."
        )
        return [Problem("parallel.pp", parallel.pp, reason, fix)]
    strangers = [name for name in names if division.part_of(name) is None]
    if strangers:
        reason = f"{strangers[0]} of the model {model_name} is in no part that parallel/stages.yaml names for {model_type}."
        fix = "Set parallel.pp=1, or add its module there to first or last."
        return [Problem("parallel.pp", parallel.pp, reason, fix)]
    if parallel.pp > num_layers:
        reason = f"the model {model_name} has {num_layers} layers, and every stage needs one."
        return [Problem("parallel.pp", parallel.pp, reason, f"Set it to at most {num_layers}.")]
    if parallel.pp_layers is not None and sum(parallel.pp_layers) != num_layers:
        reason = f"they are {sum(parallel.pp_layers)} layers, the model {model_name} has {num_layers}."
        even = [num_layers * (n + 1) // parallel.pp - num_layers * n // parallel.pp for n in range(parallel.pp)]
        fix = f"Set it to numbers that add up to {num_layers}, such as [{','.join(map(str, even))}], or to null."
        return [Problem("parallel.pp_layers", parallel.pp_layers, reason, fix)]
    return []
