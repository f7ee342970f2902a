"""When a rank is said to hang, and when not."""

from __future__ import annotations

import threading
import time

from anyshard.trainer.watchdog import Watchdog


def test_silence_is_told_once_with_the_stacks(capfd):
    told, happened = [], threading.Event()

    def tell(silent_s):
        told.append(silent_s)
        happened.set()

    with Watchdog(0.2, tell):
        assert happened.wait(20)
        time.sleep(0.5)
    assert len(told) == 1
    assert told[0] > 0.2
    assert "test_silence_is_told_once_with_the_stacks" in capfd.readouterr().err


def test_it_is_told_again_after_progress():
    told = []
    with Watchdog(0.1, told.append) as watchdog:
        for number in (1, 2):
            until = time.monotonic() + 20
            while len(told) < number and time.monotonic() < until:
                time.sleep(0.01)
            watchdog.beat()
    assert len(told) >= 2


def test_progress_and_pauses_are_no_silence():
    told = []
    with Watchdog(1.0, told.append) as watchdog:
        for _ in range(30):
            watchdog.beat()
            time.sleep(0.05)
        with watchdog.paused():
            time.sleep(1.5)
    assert told == []


def test_off():
    told = []
    before = threading.active_count()
    with Watchdog(None, told.append):
        assert threading.active_count() == before
    assert told == []
