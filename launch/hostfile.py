"""Hostfiles as DeepSpeed and Open MPI read them: `HOST slots=N`, a line for each node. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping

from anyshard.configs.errors import ConfigError, Problem

HOST = r"[A-Za-z0-9_.:-]+"


def parse(text: str, key: str, value: object) -> dict[str, int]:
    """Slots by host, in the order of the file.

    Args:
        key, value: what named the file, for errors.

    Raises:
        ConfigError: a line cannot be read, a host stands twice, or there is none.
    """
    hosts: dict[str, int] = {}
    problems: list[Problem] = []
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.partition("#")[0].strip()
        if not stripped:
            continue
        match = re.fullmatch(rf"({HOST})\s+slots=([1-9]\d*)", stripped)
        if match is None:
            problems.append(Problem(key, value, f"line {number} cannot be read: {line!r}.", "Write HOST slots=N."))
        elif match[1] in hosts:
            problems.append(Problem(key, value, f"line {number} names {match[1]} again.", "Name each host once."))
        else:
            hosts[match[1]] = int(match[2])
    if not hosts and not problems:
        problems.append(Problem(key, value, "it names no host.", "Write a line HOST slots=N for each node."))
    if problems:
        raise ConfigError(problems)
    return hosts


def render(hosts: Mapping[str, int]) -> str:
    """The text of a hostfile."""
    return "".join(f"{host} slots={slots}\n" for host, slots in hosts.items())


def select(hosts: Mapping[str, int], include: str | None, exclude: str | None) -> dict[str, list[int]]:
    """The slots that are used, by host, as DeepSpeed's `--include` and `--exclude` choose them.

    Raises:
        ConfigError: both are given, or one names a host or slot that is not there, or nothing is left.
    """
    everything = {host: list(range(slots)) for host, slots in hosts.items()}
    if include and exclude:
        fix = "Give one of the two."
        raise ConfigError(Problem("launch.deepspeed.include", include, "launch.deepspeed.exclude is given as well.", fix))
    if not include and not exclude:
        return everything
    key, spec = ("launch.deepspeed.include", include) if include else ("launch.deepspeed.exclude", exclude)
    named = _named(key, str(spec), everything)
    if include:
        return {host: named[host] for host in hosts if host in named}
    left = {host: [slot for slot in slots if slot not in named.get(host, [])] for host, slots in everything.items()}
    left = {host: slots for host, slots in left.items() if slots}
    if not left:
        raise ConfigError(Problem(key, spec, "nothing is left.", "Exclude less."))
    return left


def _named(key: str, spec: str, everything: Mapping[str, list[int]]) -> dict[str, list[int]]:
    named: dict[str, list[int]] = {}
    for part in spec.split("@"):
        match = re.fullmatch(r"([^:]+)(?::(\d+(?:,\d+)*))?", part.strip())
        if match is None or match[1] not in everything:
            fix = f"Write HOST or HOST:0,1, joined by @. There are: {', '.join(everything)}."
            raise ConfigError(Problem(key, spec, f"there is no host {part.strip()!r}.", fix))
        slots = [int(slot) for slot in match[2].split(",")] if match[2] else everything[match[1]]
        missing = [slot for slot in slots if slot not in everything[match[1]]]
        if missing:
            fix = f"It has 0 to {len(everything[match[1]]) - 1}."
            raise ConfigError(Problem(key, spec, f"{match[1]} has no slot {missing[0]}.", fix))
        named[match[1]] = sorted({*named.get(match[1], []), *slots})
    return named
