import json

import pytest

from anyshard.configs.schema import Launch
from anyshard.launch import failures
from anyshard.launch.failures import Failure
from anyshard.launch.requeue import WITHOUT_PROGRESS, after_failure, how_it_ended, main
from anyshard.launch.slurm import submitted_job


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
        ([], 140, True, True, "warned before its first step"),  # it had no handler for USR2 yet
        (["start"] * WITHOUT_PROGRESS, 75, True, False, "saved nothing; give it more time (launch.slurm.time_min"),
        (["start", "commit", *["start"] * (WITHOUT_PROGRESS - 1)], 75, True, True, "before its first step"),
    ],
)
def test_who_goes_on(happened, code, warned, goes_on, why):
    decided = how_it_ended(events(*happened), code, warned=warned, asked=False)
    assert decided.goes_on is goes_on
    assert why in decided.why


@pytest.mark.parametrize(
    ("happened", "code"),
    [(["start"], 75), (["start", "commit", "stop:signal SIGUSR2", "start"], 2), (["start", "commit"], 137)],
)
def test_who_failed(happened, code):
    assert how_it_ended(events(*happened), code, warned=False, asked=False) is None


def test_a_stop_file_that_nobody_saw_counts():
    decided = how_it_ended(events("start"), 75, warned=True, asked=True)
    assert decided[:2] == (False, "it was asked to stop (file STOP)")


def test_a_failure_that_may_be_cured_goes_on_within_its_budget():
    killed = Failure(1.0, "died", "it died", 1, rank=1, host="n2")
    assert after_failure([killed], 137, Launch(max_restarts=2)).goes_on
    assert not after_failure([killed] * 3, 137, Launch(max_restarts=2)).goes_on
    assert not after_failure([Failure(1.0, "ConfigError", "wrong", 2)], 2, Launch(max_restarts=2)).goes_on
    assert after_failure([killed] * 2, 137, Launch(max_restarts=2)).exclude == ("n2",)


RECORD = {"rank": 0, "time": 1.0, "kind": "RuntimeError", "exit_code": 1, "message": "closed by peer", "for_people": False}


def failed_job(tmp_path, monkeypatch, answer="42"):
    """A run whose rank 1 on n2 was killed, and an sbatch and scontrol that write down how they are called."""
    run, errors, programs = tmp_path / "run", tmp_path / "errors", tmp_path / "bin"
    for folder in (run, errors, programs):
        folder.mkdir()
    (run / "config.yaml").write_text("launch:\n  max_restarts: 3\n  slurm:\n    exclude: n9\n")
    (run / "events.jsonl").write_text(json.dumps({"event": "start", "world_size": 2, "hosts": ["n1", "n2"]}) + "\n")
    (errors / "rank00000.json").write_text(json.dumps(RECORD))
    for name in ("sbatch", "scontrol"):
        (programs / name).write_text(f'#!/bin/sh\necho "{name} $@ $SLURM_JOB_ID" >> {tmp_path}/calls\n{answer}\n')
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    return run, {"ANYSHARD_ERRORS": str(errors), "SLURM_JOB_ID": "41", "PATH": f"{programs}:/usr/bin:/bin"}


def test_a_node_that_fails_twice_is_left_out_and_named(tmp_path, monkeypatch, capsys):
    run, environ = failed_job(tmp_path, monkeypatch, "echo 42")
    assert main([str(run), "137"], environ) == 0
    shown = capsys.readouterr().out
    assert "rank 1 failed on n2" in shown
    assert "goes back into the queue: the ranks failed (exit code 137); restart 1 of 3" in shown
    assert not (tmp_path / "calls").exists()
    assert main([str(run), "137"], environ) == 1
    assert "n2 has failed twice and is left out" in capsys.readouterr().out
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert call == f"sbatch --parsable --exclude=n9,n2 --begin=now+20 {run}/launch/job.sbatch "  # and not as job 41
    assert submitted_job(run) == "42"
    assert [failure.host for failure in failures.read(run)] == ["n2", "n2"]


def test_a_chain_leaves_it_out_of_the_jobs_that_wait(tmp_path, monkeypatch):
    run, environ = failed_job(tmp_path, monkeypatch)
    environ["SLURM_ARRAY_JOB_ID"] = "40"
    assert [main([str(run), "137"], environ) for _ in range(2)] == [0, 0]
    assert (tmp_path / "calls").read_text().strip() == "scontrol update JobId=40 ExcNodeList=n9,n2"


def test_a_job_that_cannot_be_submitted_anew_goes_on_as_it_is(tmp_path, monkeypatch, capsys):
    run, environ = failed_job(tmp_path, monkeypatch, "echo no >&2; exit 1")
    assert [main([str(run), "137"], environ) for _ in range(2)] == [0, 0]
    assert "no job could be submitted without it" in capsys.readouterr().out


def test_one_that_is_never_requeued_shows_why_it_failed(tmp_path, monkeypatch, capsys):
    run, environ = failed_job(tmp_path, monkeypatch)
    assert main([str(run), "137", "--never"], environ) == 1
    assert "rank 1 failed on n2" in capsys.readouterr().out


def test_the_script_asks_by_exit_code(tmp_path, capsys):
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events("start")))
    assert main([str(tmp_path), "75", "--warned"]) == 0
    assert "goes back into the queue" in capsys.readouterr().out
    (tmp_path / "STOP").touch()
    assert main([str(tmp_path), "75", "--warned"]) == 1
    assert "the job ends here: it was asked to stop" in capsys.readouterr().out
