"""What nodes say about themselves before the first step, and which of them are unlike the others. Pure, no torch.

A node that is slower than the rest makes all of them wait at every step, and nobody tells which one it is.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

CLOCKS_APART_S = 5.0
"""Clocks that differ by more make logs and checkpoint ages hard to read."""

WATCHED = ("NCCL_", "GLOO_", "TORCH_NCCL_", "CUDA_DEVICE_", "PYTORCH_CUDA_ALLOC_CONF", "OMP_NUM_THREADS", "DS_ACCELERATOR")
"""Variables, or their beginnings, that must be the same everywhere."""


@dataclass(frozen=True)
class Node:
    """One node.

    Attributes:
        versions: of python and of the libraries that compute and communicate.
        devices: number and kind: "8 x NVIDIA H100 80GB HBM3, driver 570.86", "CPU".
        environ: the watched variables.
        clock_s: `time.time()` when it was asked, all at about the same moment.
        compute_s: a fixed computation on the slowest of its ranks.
        inside_s: an all-reduce among its ranks; None for a single one.
        links_s: an exchange with some other nodes, by their numbers; infinite where it failed.
    """

    host: str
    versions: Mapping[str, str]
    devices: str
    environ: Mapping[str, str] = field(default_factory=dict)
    clock_s: float = 0.0
    compute_s: float = 0.0
    inside_s: float | None = None
    links_s: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """Something about one host.

    Attributes:
        is_fatal: training could not work, or would give wrong results.
        is_slow: training would wait for it.
    """

    host: str
    text: str
    is_fatal: bool = False
    is_slow: bool = False

    def __str__(self) -> str:
        return f"{self.host}: {self.text}"


def compare(nodes: Sequence[Node], *, slow_factor: float) -> list[Finding]:
    """What is wrong with which node.

    Args:
        slow_factor: a node that takes longer than the median of all by this factor is slow.
    """
    found = [*_differences(nodes), *_broken(nodes)]
    compute = {node.host: node.compute_s for node in nodes}
    found += _slow(compute, "a matrix product takes", slow_factor)
    found += _slow({node.host: node.inside_s for node in nodes if node.inside_s}, "an all-reduce inside takes", slow_factor)
    # a healthy node has at least one fast partner, a slow one has none
    best = {node.host: min(node.links_s.values()) for node in nodes if node.links_s and min(node.links_s.values()) < math.inf}
    if len(nodes) > 2:
        found += _slow(best, "an exchange with its fastest partner takes", slow_factor)
    return found


def _differences(nodes: Sequence[Node]) -> Iterator[Finding]:
    for name in sorted({name for node in nodes for name in node.versions}):
        values = {node.host: node.versions.get(name, "missing") for node in nodes}
        for host, value in _odd(values):
            yield Finding(host, f"{name} is {value}, elsewhere {_usual(values)}", is_fatal=True)
    for host, value in _odd(devices := {node.host: node.devices for node in nodes}):
        yield Finding(host, f"it has {value}, elsewhere {_usual(devices)}")
    for name in sorted({name for node in nodes for name in node.environ}):
        values = {node.host: node.environ.get(name, "not set") for node in nodes}
        for host, value in _odd(values):
            yield Finding(host, f"{name} is {value}, elsewhere {_usual(values)}")
    usual_s = median(node.clock_s for node in nodes)
    for node in nodes:
        if abs(node.clock_s - usual_s) > CLOCKS_APART_S:
            yield Finding(node.host, f"its clock is {node.clock_s - usual_s:+.0f} s off")


def _broken(nodes: Sequence[Node]) -> Iterator[Finding]:
    for node in nodes:
        failed = [nodes[other].host for other, seconds in node.links_s.items() if math.isinf(seconds)]
        if failed:
            yield Finding(node.host, f"it cannot reach {', '.join(failed)}", is_fatal=True)


def _odd(values: Mapping[str, str]) -> list[tuple[str, str]]:
    """Hosts whose value is not that of most; the first one's where none has a majority."""
    usual = _usual(values)
    return [(host, value) for host, value in values.items() if value != usual]


def _usual(values: Mapping[str, str]) -> str:
    return Counter(values.values()).most_common(1)[0][0]


def _slow(values: Mapping[str, float], what: str, factor: float) -> Iterator[Finding]:
    if len(values) < 2:
        return
    usual = min(values.values()) if len(values) == 2 else median(values.values())
    for host, seconds in values.items():
        if seconds > factor * usual:
            times = f"{what} {1000 * seconds:.1f} ms, elsewhere {1000 * usual:.1f} ms"
            yield Finding(host, times, is_slow=True)


def rounds(count: int, most: int) -> list[list[tuple[int, int]]]:
    """Pairs that meet at the same time, so that each of `count` meets another one in every round (all but one, if odd).

    Args:
        most: rounds at most; `count` - 1 of them let everybody meet everybody.
    """
    players = list(range(count + count % 2))
    found = []
    for _ in range(min(most, len(players) - 1)):
        half = len(players) // 2
        pairs = zip(players[:half], reversed(players[half:]), strict=True)
        found.append([(min(pair), max(pair)) for pair in pairs if max(pair) < count])
        players = [players[0], players[-1], *players[1:-1]]
    return found


def watched(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that must be the same everywhere."""
    return {name: value for name, value in environ.items() if name.startswith(WATCHED)}


def table(nodes: Sequence[Node], most: int = 8) -> list[str]:
    """A line for each node; of many, those that stand out are in the findings."""

    def line(node: Node) -> str:
        links = [seconds for seconds in node.links_s.values() if seconds < math.inf]
        parts = [f"{node.host}: {node.devices}", f"compute {1000 * node.compute_s:.1f} ms"]
        parts += [f"all-reduce inside {1000 * node.inside_s:.1f} ms"] if node.inside_s else []
        parts += [f"exchange {1000 * min(links):.1f} to {1000 * max(links):.1f} ms"] if links else []
        return ", ".join(parts)

    shown = [line(node) for node in nodes[:most]]
    return [*shown, f"... and {len(nodes) - most} more nodes"] if len(nodes) > most else shown


def node_of(record: Mapping[str, Any]) -> Node:
    """A node as it was sent by JSON."""
    links = {int(other): float(seconds) for other, seconds in record["links_s"].items()}
    return Node(**{**record, "links_s": links})
