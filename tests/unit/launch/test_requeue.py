import json

import pytest

from anyshard.launch.requeue import WITHOUT_PROGRESS, decide, main


def events(*kinds):
    """`stop:reason` is a stop for that reason."""
    return [dict(zip(("event", "reason"), kind.split(":"), strict=False)) for kind in kinds]


@pytest.mark.parametrize(
    ("happened", "code", "warned", "goes_on", "why"),
    [
        (["start", "commit", "stop:signal SIGUSR2"], 75, True, True, "its state saved (signal SIGUSR2)"),
        (["start", "commit", "stop:the time limit of the job"], 75, False, True, "the time limit"),
        (["start", "commit", "stop:stop.at_s=3600"], 75, False, True, "stop.at_s=3600"),
        (["start", "commit", "stop:signal SIGUSR2"], 1, True, True, "state saved"),  # torchrun knows one code
        (["start", "commit", "done"], 0, False, False, "the run is done"),
        (["start", "commit", "done"], 0, True, False, "the run is done"),
        (["start", "commit", "stop:signal SIGTERM"], 75, False, False, "it was asked to stop (signal SIGTERM)"),
        (["start", "commit", "stop:file /runs/x/STOP"], 75, True, False, "it was asked to stop"),
        (["start", "commit", "stop:stop.at_step=10"], 75, False, False, "it was asked to stop"),
        (["start"], 75, True, True, "warned before its first step"),
        ([], 75, True, True, "warned before its first step"),
        (["start"], 75, False, False, "failed"),
        (["start", "commit", "stop:signal SIGUSR2", "start"], 2, False, False, "failed (exit code 2)"),
        (["start", "commit"], 137, False, False, "failed (exit code 137)"),
        (["start"] * WITHOUT_PROGRESS, 75, True, False, "saved nothing; give it more time (launch.slurm.time_min"),
        (["start", "commit", *["start"] * (WITHOUT_PROGRESS - 1)], 75, True, True, "before its first step"),
    ],
)
def test_who_goes_on(happened, code, warned, goes_on, why):
    decided = decide(events(*happened), code, warned=warned, asked=False)
    assert decided[0] is goes_on
    assert why in decided[1]


def test_a_stop_file_that_nobody_saw_counts():
    assert decide(events("start"), 75, warned=True, asked=True) == (False, "it was asked to stop (file STOP)")


def test_the_script_asks_by_exit_code(tmp_path, capsys):
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events("start")))
    assert main([str(tmp_path), "75", "--warned"]) == 0
    assert "goes back into the queue" in capsys.readouterr().out
    (tmp_path / "STOP").touch()
    assert main([str(tmp_path), "75", "--warned"]) == 1
    assert "the job ends here: it was asked to stop" in capsys.readouterr().out
