"""`anyshard parity`: two layouts that agree, a difference that it sees."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.cli import anyshard

pytestmark = pytest.mark.e2e


def test_one_process_and_two(tmp_path: Any) -> None:
    done = anyshard("parity", "dp1xz1", "tp2xz2", "--steps", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "dp1xz1 and tp2xz2 agree over 3 steps" in done.stdout
    assert "max |a-b|" in done.stdout
    assert (tmp_path / "parity" / "b" / "metrics.jsonl").exists()
    again = anyshard("parity", "dp1", "dp2", cwd=tmp_path)
    assert again.returncode != 0
    assert "parity" in again.stderr


@pytest.mark.slow
def test_a_difference_is_seen(tmp_path: Any) -> None:
    done = anyshard("parity", "dp1", "tp2", "debug=smoke", "--steps", "3", "--tolerance", "1e-12", cwd=tmp_path)
    assert done.returncode == 1
    assert "do NOT agree" in done.stdout
