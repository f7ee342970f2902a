import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from anyshard.configs.errors import ConfigError, DiskFullError, LaunchError
from anyshard.launch.child import call

WORKER = """
import json, os, signal, sys, time
request = json.loads(sys.argv[1])
def send(line):
    print(json.dumps(line), flush=True)
send({"progress": [1, 2]})
what = request["what"]
if what == "error":
    send({"error": [request["kind"], "it is full"]})
    sys.exit(3)
if what == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "fail":
    print("the reason", file=sys.stderr)
    sys.exit(7)
if what == "crash":
    send({"error": ["", "Traceback: deep inside"]})
    sys.exit(1)
if what == "wait":
    def end(*_):
        open(request["path"], "a").write("ended")
        sys.exit(130)
    signal.signal(signal.SIGTERM, end)
    open(request["path"], "w").close()
    time.sleep(60)
send({"result": {"answer": 42}})
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "some_worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    return "some_worker"


@pytest.mark.parametrize("show_progress", [False, True])
def test_a_result(module: str, show_progress: bool) -> None:
    assert call("working", {"what": "answer"}, show_progress=show_progress, module=module) == {"answer": 42}


def test_an_error_of_ours_passes(module: str) -> None:
    with pytest.raises(DiskFullError, match=r"^it is full$") as caught:
        call("working", {"what": "error", "kind": "DiskFullError"}, show_progress=False, module=module)
    assert caught.value.exit_code == 3
    with pytest.raises(ConfigError, match=r"^it is full$"):
        call("working", {"what": "error", "kind": "ConfigError"}, show_progress=False, module=module)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("die", r"working: the process was ended by SIGKILL\.$"),
        ("fail", r"failed with exit code 7\.\nthe reason$"),
        ("crash", r"failed with exit code 1\.\nTraceback: deep inside$"),
    ],
)
def test_a_child_that_says_nothing(module: str, what: str, reason: str) -> None:
    with pytest.raises(LaunchError, match=reason):
        call("working", {"what": what}, show_progress=False, module=module)


def test_a_signal_ends_the_child_first(module: str, tmp_path: Path) -> None:
    request = {"what": "wait", "path": str(tmp_path / "mark")}
    code = f"from anyshard.launch.child import call; call('x', {request!r}, show_progress=False, module={module!r})"
    parent = subprocess.Popen([sys.executable, "-c", code])
    until = time.monotonic() + 30
    while not (tmp_path / "mark").exists() and time.monotonic() < until:
        time.sleep(0.02)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(30) == 128 + signal.SIGTERM
    assert (tmp_path / "mark").read_text() == "ended"


def test_the_real_one_answers(tmp_path: Path) -> None:
    """Libraries may print what they like: standard output belongs to the protocol."""
    from anyshard.configs.errors import CheckpointError

    request = {"command": "diff", "a": str(tmp_path), "b": str(tmp_path), "weights_only": False}
    with pytest.raises(CheckpointError, match="there is no checkpoint here"):
        call("comparing", request, show_progress=False)
    with pytest.raises(LaunchError, match="KeyError: 'no such command'"):
        call("comparing", {"command": "no such command"}, show_progress=False)
    code = (
        "import sys; from anyshard.trainer.checkpoint.interop import __main__ as m, commands\n"
        "commands.COMMANDS['loud'] = lambda report: print('noise') or {'x': 1}\n"
        'sys.exit(m.main([\'{"command": "loud"}\']))'
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"result": {"x": 1}}
    assert "noise" in done.stderr
