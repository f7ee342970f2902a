from __future__ import annotations

import pytest
from helpers.configs import make_config

from anyshard.configs.errors import ConfigError
from anyshard.configs.world import adopt_ranks, dp_size, resolve_ranks, resolve_world, world_size


def test_nothing_is_known_before_the_ranks_are() -> None:
    config = make_config({"launch.procs_per_node": "auto"})
    assert world_size(config) is None
    assert dp_size(config) is None


def test_dp_is_what_is_left_of_the_world() -> None:
    config = resolve_ranks(make_config({"parallel.tp": 2}), nodes=2, procs_per_node=4)
    assert (world_size(config), config.parallel.dp) == (8, 4)


def test_a_world_that_cannot_be_divided_stays_unresolved() -> None:
    config = resolve_ranks(make_config({"parallel.tp": 3}), nodes=1, procs_per_node=4)
    assert config.parallel.dp == "auto"


def test_a_given_dp_is_kept_for_the_rules_to_compare() -> None:
    assert resolve_ranks(make_config({"parallel.dp": 8}), nodes=1, procs_per_node=2).parallel.dp == 8


@pytest.mark.parametrize(
    ("procs", "cluster", "found", "expected"), [("auto", None, 0, 1), ("auto", None, 4, 4), ("auto", 8, 4, 8), (2, 8, 4, 2)]
)
def test_ranks_of_a_node(procs: int | str, cluster: int | None, found: int, expected: int) -> None:
    given = make_config({"launch.procs_per_node": procs, "cluster.devices_per_node": cluster})
    config = resolve_world(given, found)
    assert config.launch.procs_per_node == expected
    assert given.launch.procs_per_node == procs  # a copy


def test_ranks_that_were_not_asked_for_are_refused() -> None:
    config = make_config({"launch.nodes": 2, "launch.procs_per_node": 4, "parallel.dp": 8})
    with pytest.raises(ConfigError, match=r"launch\.procs_per_node=4: 4 ranks are here, and .* = 8 were asked for"):
        adopt_ranks(config, nodes=1, procs_per_node=4)
    config.launch.min_nodes = 2
    with pytest.raises(ConfigError, match=r"launch\.min_nodes=2: 1 nodes are here\. Lower it"):
        adopt_ranks(config, nodes=1, procs_per_node=4)
    with pytest.raises(ConfigError, match=r"launch\.max_nodes=2: 3 nodes are here\. Raise it"):
        adopt_ranks(config, nodes=3, procs_per_node=4)


@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_dp_follows_the_nodes_that_are_here(nodes: int) -> None:
    range_ = {"launch.min_nodes": 1, "launch.max_nodes": 3}
    config = make_config({"launch.nodes": 2, "launch.procs_per_node": 4, "parallel.dp": 8, **range_})
    adopted = adopt_ranks(config, nodes=nodes, procs_per_node=4)
    assert (adopted.launch.nodes, adopted.parallel.dp) == (nodes, 4 * nodes)
    assert config.parallel.dp == 8


def test_a_run_that_shrank_may_grow_again() -> None:
    config = make_config({"launch.nodes": 2, "launch.procs_per_node": 4, "parallel.dp": 8, "launch.min_nodes": 1})
    shrunk = adopt_ranks(config, nodes=1, procs_per_node=4)
    assert adopt_ranks(shrunk, nodes=2, procs_per_node=4).parallel.dp == 8
