import socket
import threading
import time

import pytest

from anyshard.parallel.heartbeat import Heartbeat


def pair(limit_s, lost):
    """The heartbeats of a first node and of one other."""
    server = Heartbeat.listen()
    port = server.getsockname()[1]
    first, other = (Heartbeat(limit_s=limit_s, lost=lambda host, silent_s: lost.append((host, silent_s))) for _ in range(2))
    accepting = threading.Thread(target=first.accept, args=(server, 1))
    accepting.start()
    other.connect("127.0.0.1", port, me="n1", host="n0")
    accepting.join()
    return first, other


def test_nodes_that_answer_are_not_lost():
    lost = []
    first, other = pair(0.5, lost)
    with first, other:
        time.sleep(1.5)
    assert lost == []


def test_the_end_of_a_node_is_no_silence():
    lost = []
    first, other = pair(0.3, lost)
    with first:
        with other:
            time.sleep(0.1)
        time.sleep(1.0)
    assert lost == []


@pytest.mark.parametrize("silent", ["first", "other"])
def test_a_silent_node_is_lost_by_name(silent):
    lost = []
    first, other = pair(0.3, lost)
    with other if silent == "first" else first:  # the other one has a connection and says nothing
        begun = time.monotonic()
        while not lost and time.monotonic() - begun < 10:
            time.sleep(0.02)
    ((host, silent_s),) = lost
    assert host == {"first": "n0", "other": "n1"}[silent]
    assert 0.3 < silent_s < 5


def test_a_first_node_that_cannot_be_reached():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(OSError, match="refused"):
        Heartbeat(limit_s=1.0, lost=lambda host, silent_s: None).connect("127.0.0.1", port, me="n1", host="n0")
