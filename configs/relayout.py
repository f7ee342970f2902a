"""The best legal layout for the ranks that are here, where the one that was asked for does not fit them. Pure."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator

from anyshard.configs import rules
from anyshard.configs.schema import Config
from anyshard.configs.world import dp_size, model_parallel_size, world_size

_LAYOUT = ("parallel.", "train.micro_batch_size", "train.global_batch_size", "launch.procs_per_node")


def relayout(config: Config, *, always: bool = False) -> tuple[Config, list[str]]:
    """The configuration, or a copy with another layout where its own cannot be had with so many ranks.

    Best is what changes least: first only dp, then a smaller micro-batch, then the largest part of tp * pp * sp as it
    was (what a rank must hold depends on it), with tp kept before sp and sp before pp. A configuration that no layout mends
    is given back as it is, so that the rules say what is wrong with it.

    Args:
        config: with its ranks resolved.
        always: also for a run of a fixed number of nodes: somebody has asked for others.

    Returns:
        The configuration, and in words what was changed.
    """
    may = always or config.launch.min_nodes or config.launch.max_nodes
    if not may or not _is_layout_wrong(config):
        return config, []
    for candidate in _candidates(config):
        if not rules.check(candidate):
            return candidate, [_note(config, candidate)]
    return config, []


def _is_layout_wrong(config: Config) -> bool:
    problems = rules.check(config)
    return bool(problems) and all(problem.key.startswith(_LAYOUT) for problem in problems)


def _candidates(config: Config) -> Iterator[Config]:
    """Other layouts of the same ranks, the best first."""
    world = world_size(config)
    if world is None:
        return
    was, parallel = model_parallel_size(config), config.parallel

    def rank(degrees: tuple[int, int, int]) -> tuple[object, ...]:
        tp, pp, sp = degrees
        return (was - tp * pp * sp, tp != parallel.tp, sp != parallel.sp, pp != parallel.pp, degrees)

    axes = (_divisors(parallel.tp), _divisors(parallel.pp), _divisors(parallel.sp))  # what the model is known to take
    degrees = [degrees for degrees in itertools.product(*axes) if world % math.prod(degrees) == 0]
    for tp, pp, sp in sorted(degrees, key=rank):
        for micro in reversed(_divisors(config.train.micro_batch_size)):
            candidate = copy.deepcopy(config)
            candidate.parallel.tp, candidate.parallel.pp, candidate.parallel.sp = tp, pp, sp
            candidate.parallel.dp, candidate.train.micro_batch_size = world // (tp * pp * sp), micro
            yield candidate


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _note(old: Config, new: Config) -> str:
    changed = [
        f"{axis} {getattr(old.parallel, axis)} -> {getattr(new.parallel, axis)}"
        for axis in ("tp", "pp", "sp")
        if getattr(old.parallel, axis) != getattr(new.parallel, axis)
    ]
    if old.train.micro_batch_size != new.train.micro_batch_size:
        changed.append(f"train.micro_batch_size {old.train.micro_batch_size} -> {new.train.micro_batch_size}")
    return f"another layout for the {world_size(new)} ranks that are here: {', '.join(changed)}, dp {dp_size(new)}"
