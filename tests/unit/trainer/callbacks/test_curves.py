import csv
import importlib.util
import json
import struct

import pytest

from anyshard.configs.errors import EnvError
from anyshard.trainer.callbacks import curves


@pytest.fixture
def run(tmp_path):
    records = [
        {"step": s, "train/loss": 4 / s, "perf/tokens_per_s": 10.0 * s, "mem/peak_gib": 1.0, "ckpt/stall_ms": 0.0}
        for s in (1, 2, 3, 2, 3, 4)
    ]
    records[3]["train/loss"] = 9.0  # step 2 was trained again after a crash
    records.append({"step": 4, "eval/loss": 1.1})
    text = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 5, "tra')  # killed while writing
    return tmp_path


def test_what_was_trained_again_counts_once(run):
    records = curves.read_metrics(run)
    assert [(r["step"], r.get("train/loss")) for r in records] == [(1, 4.0), (2, 9.0), (3, 4 / 3), (4, 1.0), (4, None)]


def test_no_metrics_is_no_records(tmp_path):
    assert curves.read_metrics(tmp_path) == []


def test_csv_has_a_column_for_each_metric(run):
    with curves.write_csv(run).open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5
    assert rows[-1]["eval/loss"] == "1.1"
    assert rows[-1]["train/loss"] == ""


def test_plot_of_two_runs_is_a_picture(run, tmp_path):
    out = curves.plot([run, run], tmp_path / "out.png")
    header = out.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", header[16:24]) == (1320, 840)


def test_without_matplotlib_the_error_says_what_to_install(run, monkeypatch):
    monkeypatch.setattr(curves, "find_spec", lambda name: None)
    with pytest.raises(EnvError, match=r"pip install 'anyshard\[plot\]'"):
        curves.plot([run], run / "out.png")
    assert importlib.util.find_spec("matplotlib")


def test_what_a_run_has_left_by_going_back_is_dropped(tmp_path):
    steps = [10, 20, 30, 15, 25]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": s, "train/loss": 1.0}) + "\n" for s in steps))
    assert [r["step"] for r in curves.read_metrics(tmp_path)] == [10, 15, 25]


def test_resumes_are_read_from_the_events(run):
    assert curves.read_resumes(run) == []
    events = [{"event": "start"}, {"event": "restore", "step": 2}]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + '{"event": "rest')
    assert curves.read_resumes(run) == [2]
