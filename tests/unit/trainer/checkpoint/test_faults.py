import os
import signal

import pytest

from anyshard.configs.errors import CheckpointError
from anyshard.trainer.checkpoint.faults import POINTS, VARIABLE, Faults, faults_of_environment


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, signum: calls.append((pid, signum)))
    return calls


def test_the_rank_dies_at_the_point(killed: list[tuple[int, int]]) -> None:
    faults = Faults("data:1", 1)
    for point in POINTS:
        faults.reach(point)
    assert killed == [(os.getpid(), signal.SIGKILL)]


def test_the_nth_time_and_no_other_rank(killed: list[tuple[int, int]]) -> None:
    faults, other = Faults("begin:1:3", 1), Faults("begin:1:3", 0)
    for expected in (0, 0, 1, 1):
        faults.reach("begin")
        other.reach("begin")
        assert len(killed) == expected


def test_from_the_environment(monkeypatch: pytest.MonkeyPatch, killed: list[tuple[int, int]]) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    faults_of_environment(0).reach("begin")
    assert killed == []
    monkeypatch.setenv(VARIABLE, "begin:0")
    faults_of_environment(0).reach("begin")
    assert len(killed) == 1


@pytest.mark.parametrize("text", ["data", "data:x", "data:1:2:3", "lunch:0", ":1", "data:-1"])
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match=r"it is POINT:RANK or POINT:RANK:TIMES\. Points: begin, "):
        Faults(text, 0)
