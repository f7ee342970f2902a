from __future__ import annotations

import pytest

from anyshard.configs import errors
from anyshard.configs.errors import ConfigError, Problem


@pytest.mark.parametrize(
    ("name", "code"),
    [("ConfigError", 2), ("PlanError", 2), ("DataError", 2), ("EnvError", 3), ("LaunchError", 1), ("CheckpointError", 1)],
)
def test_exit_codes(name: str, code: int) -> None:
    assert getattr(errors, name).exit_code == code


def test_a_problem_says_key_value_reason_and_fix() -> None:
    assert str(Problem("a.b", True, "Why.", "Do.")) == "a.b=true: Why. Do."
    assert str(Problem("a.b", None, "Why.", "Do.")) == "a.b=null: Why. Do."
    assert len(str(Problem("a", "x" * 500, "", ""))) < 140


def test_one_problem_is_one_line_and_several_are_a_list() -> None:
    one = Problem("a", 1, "Why.", "Do.")
    assert str(ConfigError(one)) == str(one)
    assert str(ConfigError([one, one])) == f"2 problems:\n  - {one}\n  - {one}"
    assert ConfigError("text").problems == []
