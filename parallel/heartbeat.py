"""Nodes that are gone without a word: a cable, a switch or a kernel fails, and no connection is ever closed.

Collectives then wait for their timeout, which must be long. Beside training, one rank of each node exchanges a byte with
the first node all the time; who is silent for too long is lost. An end that is announced by closing is none of that.
"""

from __future__ import annotations

import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

BEATS = 5
"""Bytes sent in the time after which a silent node counts as lost."""


MEET_S = 60.0
"""Time in which the nodes have to connect."""


@dataclass
class _Peer:
    """The other end of one connection."""

    host: str
    connection: socket.socket
    heard_s: float = field(default_factory=time.monotonic)


class Heartbeat:
    """Exchanges beats with other nodes on a thread of its own, from entering to leaving it as a context manager.

    Args:
        limit_s: silence after which a node is lost.
        lost: called once, on that thread, with the host's name and the seconds of silence.
    """

    def __init__(self, *, limit_s: float, lost: Callable[[str, float], None]) -> None:
        self._limit_s, self._lost = limit_s, lost
        self._peers: list[_Peer] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    @staticmethod
    def listen() -> socket.socket:
        """The socket of the first node, to which the others connect; its port is free."""
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        return socket.create_server(("", 0), family=family, dualstack_ipv6=family == socket.AF_INET6)

    def accept(self, server: socket.socket, count: int) -> None:
        """Take the connections of `count` other nodes.

        Raises:
            OSError: they did not come in time.
        """
        server.settimeout(MEET_S)
        for _ in range(count):
            connection, _ = server.accept()
            connection.settimeout(MEET_S)
            name = b""
            while not name.endswith(b"\n"):  # beats follow it at once
                name += connection.recv(1) or b"\n"
            self._peers.append(_Peer(name.decode().rstrip("\n"), connection))
        server.close()

    def connect(self, address: str, port: int, *, me: str, host: str) -> None:
        """Connect to the first node.

        Args:
            me: name of this host.
            host: name of the first node's host.

        Raises:
            OSError: it cannot be reached.
        """
        connection = socket.create_connection((address, port), timeout=MEET_S)
        connection.sendall(f"{me}\n".encode())
        self._peers.append(_Peer(host, connection))

    def __enter__(self) -> Heartbeat:
        now = time.monotonic()
        for peer in self._peers:
            peer.connection.setblocking(False)
            peer.heard_s = now
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        for peer in self._peers:
            peer.connection.close()

    def _beat(self) -> None:
        pause_s = self._limit_s / BEATS
        with selectors.DefaultSelector() as selector:
            for peer in self._peers:
                selector.register(peer.connection, selectors.EVENT_READ, peer)
            next_s = time.monotonic()
            while not self._ended.is_set() and selector.get_map():
                if time.monotonic() >= next_s:
                    next_s = time.monotonic() + pause_s
                    for key in list(selector.get_map().values()):
                        self._send(selector, key.data)
                for key, _ in selector.select(timeout=min(0.2, pause_s)):
                    self._receive(selector, key.data)
                silent = [key.data for key in selector.get_map().values() if self._silence_s(key.data) > self._limit_s]
                if silent:
                    self._lost(silent[0].host, self._silence_s(silent[0]))
                    return

    def _silence_s(self, peer: _Peer) -> float:
        return time.monotonic() - peer.heard_s

    def _send(self, selector: selectors.BaseSelector, peer: _Peer) -> None:
        try:
            peer.connection.send(b".")
        except BlockingIOError:
            pass  # nobody reads: silence tells
        except OSError:
            selector.unregister(peer.connection)  # it has ended, which others report

    def _receive(self, selector: selectors.BaseSelector, peer: _Peer) -> None:
        try:
            received = peer.connection.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        if received:
            peer.heard_s = time.monotonic()
        else:
            selector.unregister(peer.connection)
