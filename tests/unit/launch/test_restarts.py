import os
import signal
import threading
import time

import pytest

from anyshard.launch.failures import Failure
from anyshard.launch.restarts import LONGEST_S, bad_hosts, judge, stop_wished, wait


def failure(message="boom", step=-1, **more):
    return Failure(**{"time": 1.0, "kind": "RuntimeError", "message": message, "exit_code": 1, "step": step, **more})


def judged(*failures, max_restarts=3, backoff_s=10.0):
    return judge(failures, max_restarts=max_restarts, backoff_s=backoff_s)


@pytest.mark.parametrize("more", [{"exit_code": 2}, {"exit_code": 3}, {"kind": "TrainError", "for_people": True}])
def test_what_a_restart_cannot_cure_is_never_tried(more):
    verdict = judged(failure(**more), max_restarts=100)
    assert verdict.wait_s is None
    assert "would not cure" in verdict.why


def test_the_wait_doubles_up_to_a_bound_and_the_budget_ends():
    row = [failure(f"another reason {number}") for number in range(5)]
    assert [judged(*row[:count], max_restarts=4).wait_s for count in range(1, 6)] == [10, 20, 40, 80, None]
    assert "4 restarts in a row saved nothing" in judged(*row, max_restarts=4).why
    assert judged(*row[:4], max_restarts=9, backoff_s=500).wait_s == LONGEST_S


def test_a_commit_in_between_gives_the_whole_budget_again():
    row = [failure(f"reason {step}", step=step) for step in (-1, -1, -1, 10)]
    assert judged(*row, max_restarts=3).wait_s == 10


def test_an_error_of_the_program_that_comes_again_is_not_cured():
    verdict = judged(failure("Traceback\nValueError: x"), failure("Traceback other\nValueError: x"))
    assert verdict.wait_s is None
    assert "twice in the same way" in verdict.why
    assert judged(failure("ValueError: x"), failure("ValueError: x", step=5)).wait_s is not None  # it came further
    assert judged(failure("was ended", kind="SIGKILL"), failure("was ended", kind="SIGKILL")).wait_s is not None


def test_without_a_budget_the_first_failure_ends_it():
    assert judged(failure(), max_restarts=0).wait_s is None


def test_a_host_that_fails_twice_is_named():
    row = [failure("a", host="n1"), failure("b", host="n2"), failure("c", host="n2"), failure("d", host="n3")]
    assert bad_hosts(row) == ("n2",)
    assert judged(*row, max_restarts=9).exclude == ("n2",)
    assert bad_hosts([failure(host="n1", exit_code=2), failure(host="n1", for_people=True), failure(host="n1")]) == ()


def test_the_wait_ends_with_a_signal_or_a_stop_file(tmp_path):
    before = signal.getsignal(signal.SIGUSR1)
    assert wait(0.01, [signal.SIGUSR1], lambda: stop_wished(tmp_path))
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    begun = time.monotonic()
    assert not wait(30, [signal.SIGUSR1], lambda: False)
    assert time.monotonic() - begun < 10
    (tmp_path / "STOP").touch()
    assert not wait(30, [signal.SIGUSR1], lambda: stop_wished(tmp_path))
    assert signal.getsignal(signal.SIGUSR1) is before
