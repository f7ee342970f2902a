import math

import pytest

from anyshard.parallel.nodes import Node, compare, node_of, rounds, table, watched

VERSIONS = {"torch": "2.13.0", "python": "3.11.2"}


def nodes(count=4, **changes):
    """Equal nodes n0, n1, ...; changes of the third one."""
    made = [{"host": f"n{number}", "versions": VERSIONS, "devices": "CPU", "compute_s": 0.01} for number in range(count)]
    made[2 % count] |= changes
    return [Node(**each) for each in made]


def told(found):
    return [(finding.host, finding.is_fatal, finding.is_slow) for finding in found]


def test_equal_nodes_are_fine():
    assert compare(nodes(), slow_factor=2.0) == []


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"versions": {**VERSIONS, "torch": "2.12.0"}}, (True, False)),
        ({"versions": {"python": "3.11.2"}}, (True, False)),
        ({"devices": "8 x H100"}, (False, False)),
        ({"environ": {"NCCL_DEBUG": "INFO"}}, (False, False)),
        ({"clock_s": 60.0}, (False, False)),
        ({"compute_s": 0.021}, (False, True)),
        ({"inside_s": 1.0}, (False, False)),
    ],
)
def test_the_odd_one_is_named(changes, kind):
    found = compare(nodes(**changes), slow_factor=2.0)
    assert told(found) == ([("n2", *kind)] if changes != {"inside_s": 1.0} else [])  # alone it has nothing to be compared with


def test_the_slow_end_of_slow_links_is_found():
    fast, slow = 0.01, 0.05
    links = [{1: fast, 2: slow}, {0: fast, 2: slow}, {0: slow, 1: slow}]
    found = compare([Node(f"n{i}", VERSIONS, "CPU", links_s=each) for i, each in enumerate(links)], slow_factor=2.0)
    assert told(found) == [("n2", False, True)]
    assert "50.0 ms, elsewhere 10.0 ms" in str(found[0])


def test_a_broken_link_is_told_from_both_ends():
    links = [{1: 0.01, 2: math.inf}, {0: 0.01, 2: 0.01}, {0: math.inf, 1: 0.01}]
    found = compare([Node(f"n{i}", VERSIONS, "CPU", links_s=each) for i, each in enumerate(links)], slow_factor=2.0)
    assert [str(finding) for finding in found] == ["n0: it cannot reach n2", "n2: it cannot reach n0"]
    assert all(finding.is_fatal for finding in found)


@pytest.mark.parametrize("count", [2, 3, 4, 7, 8])
def test_everybody_meets_everybody_once(count):
    every = rounds(count, most=count)
    for pairs in every:
        members = [node for pair in pairs for node in pair]
        assert len(members) == len(set(members)) >= count - 1
    assert sorted(pair for pairs in every for pair in pairs) == [(a, b) for a in range(count) for b in range(a + 1, count)]
    assert len(rounds(count, most=2)) == min(2, len(every))


def test_what_is_watched():
    assert watched({"NCCL_DEBUG": "WARN", "HOME": "/root", "OMP_NUM_THREADS": "1"}) == {
        "NCCL_DEBUG": "WARN",
        "OMP_NUM_THREADS": "1",
    }


def test_the_table_and_the_way_through_json():
    node = Node("n1", VERSIONS, "CPU", compute_s=0.01, inside_s=0.002, links_s={0: 0.003, 2: 0.004})
    assert table([node]) == ["n1: CPU, compute 10.0 ms, all-reduce inside 2.0 ms, exchange 3.0 to 4.0 ms"]
    assert table([node] * 3, most=2)[-1] == "... and 1 more nodes"
    record = {**node.__dict__, "links_s": {"0": 0.003, "2": 0.004}}
    assert node_of(record) == node
