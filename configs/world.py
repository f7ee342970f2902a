"""How many ranks a configuration asks for, and how many of them are data-parallel. Pure arithmetic."""

from __future__ import annotations

import copy

from anyshard.configs.schema import Config


def world_size(config: Config) -> int | None:
    """Ranks of the run; None while `launch.procs_per_node` is auto."""
    procs = config.launch.procs_per_node
    return config.launch.nodes * procs if isinstance(procs, int) else None


def model_parallel_size(config: Config) -> int:
    """Ranks that share one copy of the data: tp * pp * sp."""
    return config.parallel.tp * config.parallel.pp * config.parallel.sp


def dp_size(config: Config) -> int | None:
    """The data-parallel degree; None while it cannot be known, or where the world cannot be divided."""
    if isinstance(config.parallel.dp, int):
        return config.parallel.dp
    world = world_size(config)
    if world is None or world % model_parallel_size(config):
        return None
    return world // model_parallel_size(config)


def resolve_ranks(config: Config, *, nodes: int, procs_per_node: int) -> Config:
    """A copy of the configuration for this many ranks; `parallel.dp=auto` becomes a number where it can be divided."""
    result = copy.deepcopy(config)
    result.launch.nodes = nodes
    result.launch.procs_per_node = procs_per_node
    dp = dp_size(result)
    if dp is not None:
        result.parallel.dp = dp
    return result


def resolve_world(config: Config, devices_found: int) -> Config:
    """A copy with `launch.procs_per_node=auto` resolved: one rank per device of the cluster or of this host, or one.

    Args:
        devices_found: accelerators of this host.
    """
    procs = config.launch.procs_per_node
    if not isinstance(procs, int):
        procs = config.cluster.devices_per_node or devices_found or 1
    return resolve_ranks(config, nodes=config.launch.nodes, procs_per_node=procs)
