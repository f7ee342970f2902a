import json
import os
import time

import pytest

from anyshard.configs.errors import ConfigError
from anyshard.launch import runs


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "runs" / "first"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 1\n")
    (folder / "overrides.yaml").write_text("[]\n")
    return folder


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_a_folder_without_configuration_is_no_run(tmp_path):
    with pytest.raises(ConfigError, match=r"this is not a run directory: it has no config\.yaml"):
        runs.tail(tmp_path, lines=1, follow=False)


@pytest.mark.parametrize(
    ("events", "state"),
    [
        ([], "new"),
        ([{"event": "start", "pid": 2**22 + 1, "time": 1.0}], "died"),
        ([{"event": "start", "pid": os.getpid(), "time": time.time() + 1000}], "running"),
        ([{"event": "start", "pid": os.getpid(), "time": 1.0}], "died"),  # the pid was taken by a younger process
        ([{"event": "start", "pid": 1, "time": 1.0}, {"event": "stop"}], "stopped"),
        ([{"event": "start", "pid": 1, "time": 1.0}, {"event": "done"}], "done"),
        (
            [{"event": "start", "pid": 1, "time": 1.0}, {"event": "stop"}, {"event": "start", "pid": 2**22 + 1, "time": 1.0}],
            "died",
        ),
    ],
)
def test_states(run, events, state):
    if events:
        write(run / "events.jsonl", events)
    assert runs.state_of(run) == state


def test_a_torn_line_is_skipped(run):
    (run / "events.jsonl").write_text('{"event": "start", "pid": 1, "time": 1.0}\n{"event": "do')
    assert [event["event"] for event in runs.read_events(run)] == ["start"]


def test_ls_as_json(run, capsys):
    write(run / "metrics.jsonl", [{"step": 7, "train/loss": 1.5, "perf/tokens_per_s": 1000.0}])
    assert runs.ls(run.parent, as_json=True) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["state"], row["step"], row["loss"], row["tokens_per_s"], row["checkpoint"]) == ("new", 7, 1.5, 1000.0, None)


def test_ls_as_table(run, capsys):
    assert runs.ls(run.parent, as_json=False) == 0
    assert "new" in capsys.readouterr().out


def test_ls_of_nothing(tmp_path, capsys):
    assert runs.ls(tmp_path, as_json=False) == 0
    assert "no runs" in capsys.readouterr().out


def test_wishes_are_files(run, capsys):
    assert runs.ask(run, "STOP") == runs.ask(run, "SAVE") == 0
    assert (run / "STOP").exists()
    assert (run / "SAVE").exists()
    assert "is not running" in capsys.readouterr().out


def test_tail_prints_the_last_lines(run, capsys):
    write(run / "metrics.jsonl", [{"step": step, "train/loss": step / 3} for step in range(5)])
    assert runs.tail(run, lines=2, follow=False) == 0
    assert capsys.readouterr().out == "step=3 train/loss=1\nstep=4 train/loss=1.33333\n"


@pytest.mark.parametrize(
    ("queue", "events", "state"),
    [
        ("PENDING (Priority)", [], "queued"),
        ("PENDING (BeginTime)", ["start", "stop"], "queued"),
        ("RUNNING n1", ["start", "stop"], "running"),  # requeued, and its ranks are on their way
        ("RUNNING n1", ["start"], "running"),  # on another host than this
        ("RUNNING n1", ["start", "done"], "done"),
        ("", ["start", "stop"], "stopped"),
    ],
)
def test_the_state_of_a_run_in_slurms_queue(run, tmp_path, monkeypatch, queue, events, state):
    (tmp_path / "squeue").write_text(f"#!/bin/sh\necho '{queue}'\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (run / "slurm.json").write_text('{"job_id": "5"}')
    write(run / "events.jsonl", [{"event": event, "pid": 2**22 + 1, "time": 0} for event in events])
    assert runs.state_of(run) == state
