"""A part of a long campaign for every run of the tests, another part on another day; `make test-all` runs everything."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from datetime import date
from typing import TypeVar

Case = TypeVar("Case")

SEED_VARIABLE = "ANYSHARD_TEST_SEED"


def seed() -> int:
    """The day, or $ANYSHARD_TEST_SEED to repeat what another day found."""
    return int(os.environ.get(SEED_VARIABLE) or date.today().toordinal())


def some(cases: Sequence[Case], count: int) -> list[Case]:
    """`count` of the cases."""
    return random.Random(seed()).sample(list(cases), count)
