import json

import pytest

from anyshard.configs.compose import compose
from anyshard.configs.errors import ConfigError
from anyshard.configs.frozen import freeze
from anyshard.launch import failures, show
from anyshard.launch.failures import Failure


def run_in(folder, name, *overrides, loss=1.0):
    run = folder / name
    freeze(compose([*overrides, "debug=smoke", f"run.dir={run}", "launch.procs_per_node=1"]), [], run)
    records = [{"step": 7, "train/loss": loss, "perf/tokens_per_s": 10.0}, {"step": 7, "eval/loss": loss + 0.5}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return run


EVENTS = [
    {"event": "start", "time": 100.0, "world_size": 4, "hosts": ["n1", "n2"], "pid": 1},
    {"event": "commit", "time": 130.0, "step": 20},
    {"event": "start", "time": 200.0, "world_size": 2, "hosts": ["n1"], "pid": 1},
    {"event": "restore", "time": 210.0, "step": 20},
    {"event": "commit", "time": 220.0, "step": 30},
    {"event": "stop", "time": 221.0, "step": 30, "reason": "signal SIGUSR2"},
    {"event": "start", "time": 300.0, "world_size": 4, "hosts": ["n1", "n2"], "pid": 1},
    {"event": "done", "time": 310.0, "step": 40},
]


def test_every_attempt_and_how_it_ended():
    failed = [Failure(135.0, "SIGKILL", "killed", 1, rank=3, host="n2")]
    first, second, third = show.attempts(EVENTS, failed)
    assert (first["ranks"], first["hosts"], first["last_commit"]) == (4, ["n1", "n2"], 20)
    assert first["end"] == "failed: SIGKILL on n2, rank 3"
    assert (second["from_step"], second["lasted_s"], second["end"]) == (20, 21.0, "stopped: signal SIGUSR2")
    assert third["end"] == "done"
    assert show.attempts([EVENTS[0]], [])[0]["end"] == ""
    assert show.attempts([EVENTS[0], {"event": "host_lost", "time": 101.0, "host": "n2"}], [])[0]["end"] == "host_lost n2"


def test_show_prints_what_there_is(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    run = run_in(tmp_path, "a")
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in EVENTS))
    failures.append(run, Failure(135.0, "SIGKILL", "killed", 1, rank=3, host="n2"), [])
    assert show.show(run, as_json=False) == 0
    shown = capsys.readouterr().out
    assert "failed: SIGKILL on n2, rank 3" in shown
    assert "n1, n2" in shown
    assert show.show(run, as_json=True) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["state"], told["step"], len(told["attempts"])) == ("done", 7, 3)


def test_runs_side_by_side_with_the_keys_in_which_they_differ(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    runs = [run_in(tmp_path, "a", "seed=1", loss=2.0), run_in(tmp_path, "b", "seed=2", "zero=z2", loss=1.0)]
    keys = show.differing_keys(runs)
    assert keys["seed"] == [1, 2]
    assert keys["zero.stage"] == [1, 2]
    assert not any(name.startswith(("run.", "launch.")) for name in keys)
    show.print_results([*runs, tmp_path / "never-started"])
    best, worst = [line for line in capsys.readouterr().out.splitlines() if str(tmp_path)[:12] in line]
    assert "/b" in best
    assert "/a" in worst
    assert show.compare(runs, out=tmp_path / "both.png", as_json=False) == 0
    assert (tmp_path / "both.png").stat().st_size > 1000
    assert show.compare(runs, out=None, as_json=True) == 0


def test_one_run_cannot_be_compared(tmp_path):
    with pytest.raises(ConfigError, match="at least two"):
        show.compare([tmp_path], out=None, as_json=False)
