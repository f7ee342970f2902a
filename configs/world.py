"""How many ranks a configuration asks for, and how many of them are data-parallel. Pure arithmetic."""

from __future__ import annotations

import copy

from anyshard.configs.errors import ConfigError, Problem
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


def node_range(config: Config) -> tuple[int, int]:
    """The fewest and the most nodes that the run takes."""
    launch = config.launch
    return launch.min_nodes or launch.nodes, launch.max_nodes or launch.nodes


def resolve_ranks(config: Config, *, nodes: int, procs_per_node: int) -> Config:
    """A copy of the configuration for this many ranks; `parallel.dp=auto` becomes a number where it can be divided."""
    result = copy.deepcopy(config)
    result.launch.nodes = nodes
    result.launch.procs_per_node = procs_per_node
    dp = dp_size(result)
    if dp is not None:
        result.parallel.dp = dp
    return result


def adopt_ranks(config: Config, *, nodes: int, procs_per_node: int) -> Config:
    """A copy of the configuration for the ranks that were started; dp is derived anew where min_nodes or max_nodes let it.

    Raises:
        ConfigError: other ranks were asked for.
    """
    asked, here, launch = world_size(config), nodes * procs_per_node, config.launch
    if asked is not None and asked != here:
        if (launch.min_nodes, launch.max_nodes) == (None, None) or procs_per_node != launch.procs_per_node:
            reason = f"{here} ranks are here, and launch.nodes * launch.procs_per_node = {asked} were asked for."
            fix = f"Start {asked} ranks, or set it to auto."
            raise ConfigError(Problem("launch.procs_per_node", launch.procs_per_node, reason, fix))
        fewest, most = node_range(config)
        if nodes < fewest:
            raise ConfigError(Problem("launch.min_nodes", fewest, f"{nodes} nodes are here.", "Lower it, or wait."))
        if nodes > most:
            raise ConfigError(Problem("launch.max_nodes", most, f"{nodes} nodes are here.", "Raise it, or start fewer."))
        config = copy.deepcopy(config)
        config.parallel.dp = "auto"
        config.launch.max_nodes = most  # the next start may have them again
    return resolve_ranks(config, nodes=nodes, procs_per_node=procs_per_node)


def resolve_world(config: Config, devices_found: int) -> Config:
    """A copy with `launch.procs_per_node=auto` resolved: one rank per device of the cluster or of this host, or one.

    Args:
        devices_found: accelerators of this host.
    """
    procs = config.launch.procs_per_node
    if not isinstance(procs, int):
        procs = config.cluster.devices_per_node or devices_found or 1
    return resolve_ranks(config, nodes=config.launch.nodes, procs_per_node=procs)
