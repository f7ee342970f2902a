import os
import signal
import time

import pytest

from anyshard.configs import schema
from anyshard.trainer.allocation import Allocation
from anyshard.trainer.signals import Interrupted, Signals
from anyshard.trainer.stop import Decision, StopControl


@pytest.fixture
def handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def control(tmp_path, signals=None, **options):
    return StopControl(schema.Stop(**options), tmp_path, signals or Signals(training=True), None, 0)


def test_nothing_is_decided_without_a_wish(tmp_path):
    assert control(tmp_path).decide(1) == Decision()


def test_at_step(tmp_path):
    stops = control(tmp_path, at_step=3)
    assert [stops.decide(step).stop for step in (1, 2, 3)] == [None, None, "stop.at_step=3"]


def test_at_s(tmp_path):
    stops = control(tmp_path, at_s=1000.0)
    assert stops.decide(1).stop is None
    stops.started_s = time.monotonic() - 1001
    assert stops.decide(2).stop == "stop.at_s=1000"


def test_the_stop_file_stays_and_the_save_file_is_taken(tmp_path):
    stops = control(tmp_path)
    (tmp_path / "SAVE").touch()
    assert stops.decide(1) == Decision(save=True)
    assert stops.decide(2) == Decision()
    (tmp_path / "STOP").touch()
    assert stops.decide(3).stop == f"file {tmp_path / 'STOP'}"
    assert (tmp_path / "STOP").exists()


def test_only_rank_0_looks_for_files(tmp_path):
    (tmp_path / "STOP").touch()
    assert StopControl(schema.Stop(), tmp_path, Signals(training=True), None, 1).decide(1) == Decision()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_while_training_is_a_wish(tmp_path, handlers, signum):
    signals = Signals()
    signals.install()
    signals.training = True
    os.kill(os.getpid(), signum)
    assert control(tmp_path, signals).decide(1).stop == f"signal {signum.name}"


def test_a_signal_before_training_ends_the_process_at_once(handlers):
    Signals().install()
    with pytest.raises(Interrupted, match="SIGTERM before the first step"):
        os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)  # once: another must not hit what cleans up


def test_the_end_of_the_job_is_seen_by_rank_0(tmp_path):
    over, goes_on = Allocation("7", time.time() + 5, margin_s=10), Allocation("7", time.time() + 1000, margin_s=10)
    stops, other = control(tmp_path), StopControl(schema.Stop(), tmp_path, Signals(training=True), None, 1)
    stops.allocation = goes_on
    assert stops.decide(1) == Decision()
    stops.allocation = other.allocation = over
    assert stops.decide(2).stop == "the time limit of the job"
    assert other.decide(2) == Decision()


def test_the_first_signal_is_the_reason(tmp_path, handlers):
    signals = Signals()
    signals.install()
    signals.training = True
    os.kill(os.getpid(), signal.SIGUSR2)
    os.kill(os.getpid(), signal.SIGTERM)
    assert control(tmp_path, signals).decide(1).stop == "signal SIGUSR2"


def test_a_wish_counts_in_the_middle_of_a_step(tmp_path):
    stops = control(tmp_path)
    assert stops.poll() is None
    (tmp_path / "SAVE").touch()
    assert stops.poll() is None
    assert not (tmp_path / "SAVE").exists()
    assert stops.decide(1) == Decision(save=True)  # between two steps, where there is something to save
    assert stops.decide(2) == Decision()
    (tmp_path / "STOP").touch()
    assert stops.poll() == f"file {tmp_path / 'STOP'}"
    (tmp_path / "STOP").unlink()
    assert stops.decide(3).stop == stops.poll() == f"file {tmp_path / 'STOP'}"  # what was agreed stays


def test_a_slow_save_ends_the_run_earlier(tmp_path):
    stops = control(tmp_path)
    stops.allocation = Allocation("7", time.time() + 50, margin_s=10, most_s=90)
    assert stops.poll() is None
    stops.needed_s = 20
    assert stops.poll() is None
    stops.needed_s = 40
    assert stops.poll() == "the time limit of the job"


def test_signals_change_nothing_once_the_end_is_known(handlers):
    signals = Signals(over=True)
    signals.install()
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals.received is None


def test_a_library_gets_its_handlers_back(handlers):
    signal.signal(signal.SIGTERM, before := lambda number, frame: None)
    signals = Signals()
    signals.install()
    signals.uninstall()
    assert signal.getsignal(signal.SIGTERM) is before
