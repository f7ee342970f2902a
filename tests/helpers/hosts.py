"""Hosts on this machine: network namespaces joined by veth pairs and a bridge, each with a name and an address of its own.

Nothing of the machine's own network is touched: the bridge, too, is in a namespace.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

NETWORK = "10.207.41"


def why_not() -> str | None:
    """Why no hosts can be made here; None where they can."""
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    missing = [name for name in ("ip", "unshare") if shutil.which(name, path=_path()) is None]
    if missing:
        return f"{', '.join(missing)} not installed: apt-get install iproute2 util-linux"
    probe = f"anyshard-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], env=_environ(), capture_output=True, text=True, check=False)
    if made.returncode:
        return f"no network namespaces can be made here ({made.stderr.strip()})"
    pair = ["ip", "-n", probe, "link", "add", "veth0", "type", "veth", "peer", "name", "veth1"]
    paired = subprocess.run(pair, env=_environ(), capture_output=True, text=True, check=False)
    _ip("netns", "del", probe)
    return f"no veth pairs can be made here ({paired.stderr.strip()})" if paired.returncode else None


@dataclass(frozen=True)
class Host:
    """One of them.

    Attributes:
        name: resolves on all of them.
    """

    name: str
    namespace: str
    switch: str
    address: str

    def command(self, *argv: str) -> list[str]:
        """A command line that runs there, under the host's name."""
        named = ["unshare", "--uts", "sh", "-c", f'hostname {self.name}; exec "$@"', "sh"]
        return ["ip", "netns", "exec", self.namespace, *named, *argv]

    def cable(self, *, plugged: bool) -> None:
        """Pull its cable out of the switch, or plug it in again."""
        _ip("-n", self.switch, "link", "set", f"to-{self.name}", "up" if plugged else "down")


@contextlib.contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """So many hosts that reach each other; gone with the block."""
    prefix = f"as{os.getpid()}"
    switch = f"{prefix}-switch"
    made = [Host(f"n{number}", f"{prefix}-n{number}", switch, f"{NETWORK}.{number + 1}") for number in range(count)]
    table = "127.0.0.1 localhost\n" + "".join(f"{host.address} {host.name}\n" for host in made)
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", switch, "link", "set", "br0", "up")
        for host in made:
            _ip("netns", "add", host.namespace)
            _ip("-n", switch, "link", "add", f"to-{host.name}", "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
            _ip("-n", switch, "link", "set", f"to-{host.name}", "master", "br0", "up")
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
            _ip("-n", host.namespace, "link", "set", "eth0", "up")
            _ip("-n", host.namespace, "link", "set", "lo", "up")
            etc = Path("/etc/netns", host.namespace)  # `ip netns exec` shows it as /etc
            etc.mkdir(parents=True)
            (etc / "hosts").write_text(table)
        yield made
    finally:
        for namespace in [switch, *(host.namespace for host in made)]:
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "del", namespace)
            shutil.rmtree(Path("/etc/netns", namespace), ignore_errors=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], env=_environ(), check=True, capture_output=True)


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def _environ() -> dict[str, str]:
    return {**os.environ, "PATH": _path()}


def pids_in(members: Sequence[Host]) -> list[int]:
    """Processes that still run on these hosts."""
    found = []
    for host in members:
        listed = subprocess.run(
            ["ip", "netns", "pids", host.namespace], env=_environ(), capture_output=True, text=True, check=False
        )
        found += [int(pid) for pid in listed.stdout.split()]
    return found
