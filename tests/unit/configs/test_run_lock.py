"""One live run for each run directory."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from anyshard.configs import run_lock
from anyshard.configs.errors import EnvError
from anyshard.configs.run_lock import check_free, only_run

HOLDER = """
import sys, time
from pathlib import Path
from anyshard.configs.run_lock import only_run
with only_run(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_live_run_keeps_others_out_and_is_named(tmp_path, holder):
    with pytest.raises(EnvError, match=f"process {holder.pid} on .*runs stop"), only_run(tmp_path, wait_s=0.1):
        pass
    with pytest.raises(EnvError, match=f"process {holder.pid}"):
        check_free(tmp_path)


def test_the_lock_of_a_killed_run_is_free_at_once(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    with only_run(tmp_path):
        pass
    check_free(tmp_path)


def test_an_ending_run_is_waited_for(tmp_path, holder):
    subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -9 {holder.pid}"])
    with only_run(tmp_path, wait_s=20):
        pass


def test_one_run_after_the_other_and_in_new_folders(tmp_path):
    for _ in range(2):
        with only_run(tmp_path / "new" / "run"):
            pass


def test_checking_makes_nothing(tmp_path):
    check_free(tmp_path / "nothing")
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_stops_nobody(tmp_path, monkeypatch):
    def refuse(descriptor: int, how: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(run_lock.fcntl, "flock", refuse)
    with only_run(tmp_path, wait_s=0):
        check_free(tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvError, match="a file is in the way"), only_run(tmp_path / "file"):
        pass
