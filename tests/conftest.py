"""What every test has: the rank pools end with the session, and nothing is read from a hub or sent to a service."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest
from helpers.ranks import close_pools
from helpers.sampling import SEED_VARIABLE, mark_the_rest_slow, seed

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
hypothesis.settings.register_profile("anyshard", deadline=None)  # other work on the machine is no failure
hypothesis.settings.load_profile("anyshard")
os.environ[SEED_VARIABLE] = str(seed())  # the same in every worker, also at midnight


@pytest.fixture(scope="session", autouse=True)
def _pools() -> Iterator[None]:
    yield
    close_pools()


def pytest_report_header() -> str:
    return f"campaigns are sampled by {SEED_VARIABLE}={seed()}"


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_the_rest_slow(items)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files anew")
