import io
import json
import logging
import resource
import time

import pytest
import torch

from anyshard.trainer.metrics import JsonLines, Reporter, duration, human, peak_memory_gib, step_line

RECORD = {
    "step": 120,
    "tokens": 1_000_000,
    "train/loss": 2.73119,
    "train/lr": 3e-4,
    "train/grad_norm": 0.8149,
    "perf/tokens_per_s": 412_345.0,
    "perf/mfu_pct": 43.12,
    "perf/step_s": 0.5,
    "perf/data_wait_pct": 0.31,
    "perf/eta_s": 4320.0,
    "ckpt/stall_ms": 4.2,
    "mem/peak_gib": 61.2,
}


@pytest.mark.parametrize(
    ("number", "text"), [(7, "7"), (999, "999"), (1234, "1.23k"), (999_600, "1M"), (412_345, "412k"), (3.2e15, "3.2P")]
)
def test_human(number, text):
    assert human(number) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (42, "42s"), (200, "3m20s"), (4320, "1h12m"), (187_200, "2d4h")])
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_the_step_line():
    assert step_line(RECORD, 1000) == (
        "step  120/1000  12%  loss 2.7312  lr 3.0e-04  gnorm 0.81  412k tok/s  43.1% MFU  61.20GiB  "
        "data 0.3%  ckpt 4ms  eta 1h12m"
    )


def test_the_step_line_leaves_out_what_is_not_known():
    bare = {**RECORD, "train/grad_norm": None, "perf/mfu_pct": None, "ckpt/stall_ms": 0.0, "train/skipped_steps": 2}
    line = step_line(bare, 1000)
    assert not any(word in line for word in ("gnorm", "MFU", "ckpt"))
    assert "skipped 2" in line


class Recorder:
    def __init__(self):
        self.records, self.ended = [], None

    def log(self, record):
        self.records.append(record)

    def finish(self, *, failed):
        self.ended = failed


def test_rank_0_writes_files_console_and_trackers(tmp_path):
    tracker, stream = Recorder(), io.StringIO()
    with Reporter(tmp_path, rank=0, max_steps=1000, trackers=[tracker], stream=stream) as reporter:
        reporter.start_bar(0)  # not a terminal: no bar, no control characters
        reporter.event("start", world_size=2)
        reporter.step(RECORD)
        reporter.tick(120)
        reporter.evaluation({"step": 120, "eval/loss": 2.0, "eval/perplexity": 7.389})
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == [120, 120]
    assert metrics[0]["train/loss"] == 2.73119
    assert json.loads((tmp_path / "events.jsonl").read_text())["event"] == "start"
    assert stream.getvalue().splitlines() == [step_line(RECORD, 1000), "eval at step 120: loss 2.0000  perplexity 7.3890"]
    assert [r["step"] for r in tracker.records] == [120, 120]
    assert tracker.ended is False


def test_other_ranks_write_nothing(tmp_path):
    with Reporter(tmp_path, rank=1, max_steps=10, trackers=[]) as reporter:
        reporter.event("start")
        reporter.step(RECORD)
        reporter.say("hello")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_run_is_told_to_the_trackers(tmp_path):
    tracker = Recorder()
    with pytest.raises(RuntimeError), Reporter(tmp_path, rank=0, max_steps=10, trackers=[tracker]):
        raise RuntimeError
    assert tracker.ended is True


def test_peak_memory_of_this_process_is_plausible():
    assert 0.05 < peak_memory_gib(torch.device("cpu")) < 100


class Terminal(io.StringIO):
    """What is written to a terminal; rich asks the stream and TERM whether it is one."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch):
    for name in ("ANYSHARD_NO_BAR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "200")
    return Terminal()


HIDE_CURSOR, SHOW_CURSOR, ERASE_LINE = "\x1b[?25l", "\x1b[?25h", "\x1b[2K"


def test_the_bar_moves_with_the_steps_and_lines_stay_above_it(tmp_path, terminal):
    with Reporter(tmp_path, rank=0, max_steps=1000, trackers=[], stream=terminal) as reporter:
        reporter.start_bar(100)
        assert "training" in terminal.getvalue()
        assert "100/1000" in terminal.getvalue()
        reporter.tick(120)
        reporter.step(RECORD)
        until = time.monotonic() + 20
        while " 120/1000" not in terminal.getvalue():  # it is drawn anew twice a second
            assert time.monotonic() < until
            time.sleep(0.02)
        drawn = terminal.getvalue()
        assert drawn.rindex("training") > drawn.rindex("loss 2.7312")
        assert HIDE_CURSOR in drawn
        assert SHOW_CURSOR not in drawn
    ended = terminal.getvalue()
    assert step_line(RECORD, 1000) in ended
    assert ended.rindex(SHOW_CURSOR) > ended.rindex(HIDE_CURSOR)
    assert ended.rindex(ERASE_LINE) > ended.rindex("training")  # nothing of it is left behind


def test_the_bar_is_taken_down_when_the_run_fails(tmp_path, terminal):
    def fail(reporter):
        with reporter:
            reporter.start_bar(0)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail(Reporter(tmp_path, rank=0, max_steps=10, trackers=[], stream=terminal))
    assert terminal.getvalue().rindex(SHOW_CURSOR) > terminal.getvalue().rindex(HIDE_CURSOR)


@pytest.mark.parametrize("why", ["ANYSHARD_NO_BAR", "another rank"])
def test_no_bar(why, tmp_path, terminal, monkeypatch):
    if why == "ANYSHARD_NO_BAR":
        monkeypatch.setenv("ANYSHARD_NO_BAR", "1")
    with Reporter(tmp_path, rank=int(why == "another rank"), max_steps=1000, trackers=[], stream=terminal) as reporter:
        reporter.start_bar(0)
        reporter.tick(120)
        reporter.step(RECORD)
    assert terminal.getvalue() == (step_line(RECORD, 1000) + "\n" if why == "ANYSHARD_NO_BAR" else "")


class Gone(io.StringIO):
    """A terminal that was closed."""

    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")


def test_without_a_console_training_goes_on(tmp_path, caplog):
    with Reporter(tmp_path, rank=0, max_steps=10, trackers=[], stream=Gone()) as reporter:
        reporter.say("nobody reads this")
        reporter.step(RECORD)
    assert "the console cannot be written" in caplog.text
    assert len(caplog.records) == 1
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 120


def test_numbers_that_are_not_finite_are_null(tmp_path):
    file = JsonLines(tmp_path / "metrics.jsonl")
    file.write({"step": 1, "train/grad_norm": float("inf"), "train/loss": float("nan"), "perf/step_s": 0.5})
    file.close()
    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert record == {"step": 1, "train/grad_norm": None, "train/loss": None, "perf/step_s": 0.5}


def test_a_full_disk_costs_lines_and_not_the_training(tmp_path, caplog):
    """A limit on the size of files stands for the disk: the system writes a part and then refuses, alike."""
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.write({"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with caplog.at_level(logging.WARNING):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
        try:
            lines.write({"step": 2})
            lines.write({"step": 3})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    lines.write({"step": 4})
    lines.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 4]
    (told,) = caplog.messages
    assert "metrics.jsonl cannot be written" in told
    assert "training goes on" in told
