"""A part of a long campaign for every run of the tests, another part on another day; `make test-all` runs everything.

@pytest.mark.sampled(5)  # five of the cells, the others are `slow`
@pytest.mark.parametrize("layout", LAYOUTS)
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from datetime import date
from typing import TypeVar

import pytest

Case = TypeVar("Case")

SEED_VARIABLE = "ANYSHARD_TEST_SEED"


def seed() -> int:
    """The day, or $ANYSHARD_TEST_SEED to repeat what another day found."""
    return int(os.environ.get(SEED_VARIABLE) or date.today().toordinal())


def some(cases: Sequence[Case], count: int) -> list[Case]:
    """`count` of the cases."""
    return random.Random(seed()).sample(list(cases), count)


def mark_the_rest_slow(items: Sequence[pytest.Item]) -> None:
    """Of each test that is `sampled(count)`, or of all that share an `of`, every cell but `count` becomes `slow`."""
    tests: dict[str, list[pytest.Item]] = {}
    counts: dict[str, int] = {}
    for item in items:
        marker = item.get_closest_marker("sampled")
        if marker is not None and item.get_closest_marker("slow") is None:
            test = marker.kwargs.get("of", item.nodeid.partition("[")[0])
            tests.setdefault(test, []).append(item)
            counts[test] = marker.args[0]
    for test, cells in tests.items():
        chosen = some(cells, min(len(cells), counts[test]))
        for cell in cells:
            if cell not in chosen:
                cell.add_marker("slow")
