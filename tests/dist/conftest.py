"""What the tests of several axes share."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.axes import BASE
from helpers.fitting import train


@pytest.fixture(scope="session")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The records of the run that every mesh must repeat."""
    return train(tmp_path_factory.mktemp("one_process"), [*BASE, "zero=z0"], 1)
