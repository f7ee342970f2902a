import pytest

from anyshard.configs.errors import ConfigError
from anyshard.launch.hostfile import parse, render, select

HOSTS = {"node0": 4, "node1": 4, "node2": 4}


def read(text):
    return parse(text, "launch.deepspeed.hostfile", "/etc/hosts")


def test_what_is_written_is_read():
    assert read(render(HOSTS)) == HOSTS


def test_comments_and_empty_lines():
    assert read("# ours\n\nnode-a.x  slots=8  # the first\n10.0.0.1 slots=2\n") == {"node-a.x": 8, "10.0.0.1": 2}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("node0\n", r"launch\.deepspeed\.hostfile=/etc/hosts: line 1 cannot be read: 'node0'\. Write HOST slots=N"),
        ("node0 slots=0\n", "line 1 cannot be read"),
        ("node0 slots=8\nnode0 slots=8\n", "line 2 names node0 again"),
        ("# nothing\n", "names no host"),
        ("node0\nnode1 slots=x\n", "2 problems"),
    ],
)
def test_what_cannot_be_read_is_told(text, told):
    with pytest.raises(ConfigError, match=told):
        read(text)


@pytest.mark.parametrize(
    ("include", "exclude", "left"),
    [
        (None, None, {"node0": [0, 1, 2, 3], "node1": [0, 1, 2, 3], "node2": [0, 1, 2, 3]}),
        ("node2@node0:1,0", None, {"node0": [0, 1], "node2": [0, 1, 2, 3]}),
        (None, "node1", {"node0": [0, 1, 2, 3], "node2": [0, 1, 2, 3]}),
        (None, "node0:3@node1@node2", {"node0": [0, 1, 2]}),
    ],
)
def test_hosts_are_chosen_as_deepspeed_does(include, exclude, left):
    assert select(HOSTS, include, exclude) == left
    # Source: deepspeed/launcher/runner.py, parse_inclusion_exclusion
    from deepspeed.launcher.runner import parse_inclusion_exclusion

    assert dict(parse_inclusion_exclusion(HOSTS, include or "", exclude or "")) == left


@pytest.mark.parametrize(
    ("include", "exclude", "told"),
    [
        ("node0", "node1", r"launch\.deepspeed\.exclude is given as well"),
        ("node7", None, r"include=node7: there is no host 'node7'\. .*There are: node0, node1, node2"),
        (None, "node1:4", r"exclude=node1:4: node1 has no slot 4\. It has 0 to 3"),
        ("node0:a", None, "there is no host 'node0:a'"),
        (None, "node0@node1@node2", "nothing is left"),
    ],
)
def test_a_choice_that_cannot_be_is_told(include, exclude, told):
    with pytest.raises(ConfigError, match=told):
        select(HOSTS, include, exclude)
