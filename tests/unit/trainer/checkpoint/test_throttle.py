import threading
import time

from anyshard.trainer.checkpoint.throttle import Throttle


def seconds(throttle: Throttle, num_bytes: int, times: int) -> float:
    started = time.perf_counter()
    for _ in range(times):
        throttle.wait(num_bytes)
    return time.perf_counter() - started


def test_writing_takes_the_time_that_the_rate_says() -> None:
    assert 0.2 <= seconds(Throttle(10_000.0), 200, 10) < 2.0
    assert seconds(Throttle(None), 10**9, 10) < 0.1


def test_whoever_waits_lifts_it() -> None:
    throttle = Throttle(1.0)
    threading.Timer(0.05, throttle.lift).start()
    assert 0.04 <= seconds(throttle, 1000, 3) < 5
    throttle.set()
    assert seconds(throttle, 1, 1) >= 0.5
