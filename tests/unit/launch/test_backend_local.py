import contextlib
import json
import socket
from pathlib import Path

import pytest

from anyshard.configs.errors import ConfigError, EnvError
from anyshard.launch import backend_local
from anyshard.launch.backend_local import LocalBackend
from anyshard.launch.spec import LaunchSpec

SPEC = LaunchSpec(
    run_dir=Path("/runs/x"), nodes=1, procs_per_node=2, port=None, python="/venv/bin/python", env={"OMP_NUM_THREADS": "1"}
)


def test_render_is_torchrun():
    rendered = LocalBackend().render(SPEC)
    assert rendered.text() == (
        "OMP_NUM_THREADS=1 \\\n"
        "/venv/bin/python -m torch.distributed.run --nproc-per-node=2 --standalone -m anyshard.trainer.run --run-dir /runs/x"
    )


def test_several_nodes_are_another_launchers_work():
    with pytest.raises(ConfigError, match=r"launch\.nodes=2: .*torchrun"):
        LocalBackend().check(LaunchSpec(**{**SPEC.__dict__, "nodes": 2}))


@pytest.mark.parametrize(("num_gpus", "refused"), [(0, False), (1, True), (2, False), (8, False)])
def test_each_rank_has_a_gpu_where_there_are_any(num_gpus, refused):
    told = r"launch\.procs_per_node=2: .*a node has 1\. Set it to 1 or auto, or hide the GPUs"
    with pytest.raises(ConfigError, match=told) if refused else contextlib.nullcontext():
        LocalBackend().check(LaunchSpec(**{**SPEC.__dict__, "gpus_per_node": num_gpus}))


def test_a_killed_torchrun_is_named(tmp_path, capsys):
    assert conclude(tmp_path, -9) == 1
    assert "torchrun was ended by SIGKILL" in capsys.readouterr().err


def test_a_port_of_ones_own():
    rendered = LocalBackend().render(LaunchSpec(**{**SPEC.__dict__, "port": 29501}))
    assert "--master-port=29501 --master-addr=127.0.0.1" in " ".join(rendered.argv)
    assert "--standalone" not in rendered.argv


def test_a_port_in_use_is_refused_before_anything_starts(tmp_path):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        with pytest.raises(EnvError, match=rf"launch\.port={port}: something listens on this port already\. Choose another"):
            LocalBackend().check(LaunchSpec(**{**SPEC.__dict__, "run_dir": tmp_path, "port": port}))
    assert list(tmp_path.iterdir()) == []


def record(logs, rank, time, *, kind="RuntimeError", code=1, message="boom", for_people=False):
    folder = logs / "errors"
    folder.mkdir(parents=True, exist_ok=True)
    content = {"rank": rank, "time": time, "kind": kind, "exit_code": code, "message": message, "for_people": for_people}
    (folder / f"rank{rank:05d}.json").write_text(json.dumps(content))


def conclude(logs, returncode=1, *, wished=False, report=""):
    return backend_local._conclude(returncode, logs / "logs", logs / "errors", wished=wished, report=report)


def killed(rank, code):
    return f"  rank      : {rank} (local_rank: {rank})\n  exitcode  : {code} (pid: 77)\n"


def test_the_first_failure_is_shown_alone(tmp_path, capsys):
    record(
        tmp_path, 0, 1.0, message="RuntimeError: Connection closed by peer"
    )  # rank 0 noticed before rank 1 had written its own
    record(tmp_path, 1, 2.0, message="Traceback ...\nValueError: the reason")
    assert conclude(tmp_path, report=killed(0, -15)) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("rank 1 failed")
    assert "ValueError: the reason" in shown
    assert "Connection closed" not in shown


def test_an_error_for_people_is_shown_without_traceback(tmp_path, capsys):
    record(tmp_path, 0, 1.0, kind="DataError", code=2, message="data.path=x: it is empty. Use another.", for_people=True)
    assert conclude(tmp_path) == 2
    assert capsys.readouterr().err == "DataError: data.path=x: it is empty. Use another.\n"


@pytest.mark.parametrize(
    ("events", "wished", "code"),
    [
        (["start", "commit", "done"], False, 1),
        (["start", "stop", "commit"], False, 75),
        (["start", "stop", "start"], False, 1),  # the stop was that of an earlier attempt
        (["start"], True, 75),
        ([], True, 75),
    ],
)
def test_the_exit_code_of_a_stop(tmp_path, events, wished, code):
    (tmp_path / "events.jsonl").write_text("".join(json.dumps({"event": event, "step": 1}) + "\n" for event in events))
    assert conclude(tmp_path, wished=wished) == code


def test_a_killed_rank_is_named_rather_than_those_that_missed_it(tmp_path, capsys):
    record(tmp_path, 0, 1.0, message="RuntimeError: Connection reset by peer")
    assert conclude(tmp_path, report=killed(0, -15) + killed(1, -9)) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("rank 1 was ended by SIGKILL (the kernel does that when memory runs out")
    assert "Connection" not in shown


def test_a_rank_that_torchrun_killed_because_it_did_not_follow_a_wish_is_no_failure(tmp_path):
    went = "  rank      : 1 (local_rank: 1)\n  exitcode  : 75 (pid: 78)\n"
    assert conclude(tmp_path, wished=True, report=went + killed(0, -9)) == 75
    assert conclude(tmp_path, wished=True, report=killed(0, -9)) == 1
    assert conclude(tmp_path, wished=False, report=went + killed(0, -9)) == 1


def test_a_lost_connection_alone_is_shown(tmp_path, capsys):
    record(tmp_path, 0, 1.0, message="RuntimeError: Connection reset by peer")
    assert conclude(tmp_path) == 1
    assert "Connection reset by peer" in capsys.readouterr().err


def test_a_silent_end_names_the_log(tmp_path, capsys):
    assert conclude(tmp_path) == 1
    assert "launcher.log" in capsys.readouterr().err


def test_success(tmp_path):
    assert conclude(tmp_path, 0) == 0
