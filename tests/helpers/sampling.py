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
    """Of each test that is `sampled(count)`, all cells but `count` become `slow`."""
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("sampled"):
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cells in tests.values():
        marker = cells[0].get_closest_marker("sampled")
        assert marker is not None
        chosen = some(cells, min(len(cells), marker.args[0]))
        for cell in cells:
            if cell not in chosen:
                cell.add_marker("slow")
