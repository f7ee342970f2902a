"""The other launchers, really started: the deepspeed launcher, and torchrun on two nodes that share this host."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys

import psutil
import pytest
from helpers.cli import anyshard, environment, finish, happened, rank_pids, start, steps, wait_for

pytestmark = pytest.mark.e2e

BRIEF = ["debug=smoke", "run.dir=run", "train.eval_every_steps=0", "cluster=cpu"]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def test_deepspeed_stops_and_another_launcher_goes_on(tmp_path):
    """The run directory moves between launchers."""
    two = ["launch=deepspeed", "launch.procs_per_node=2", f"launch.port={free_port()}"]
    done = anyshard("train", *BRIEF, *two, "stop.at_step=10", cwd=tmp_path)
    assert done.returncode == 75, done.stdout + done.stderr
    assert (tmp_path / "run/launch/hostfile").read_text() == "localhost slots=2\n"
    done = anyshard("resume", "run", "launch=local", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [event["step"] for event in happened(tmp_path / "run", "restore")] == [10]
    assert [event["world_size"] for event in happened(tmp_path / "run", "start")] == [2, 2]


def test_two_nodes_of_torchrun_start_in_any_order_and_stop_together(tmp_path):
    run = tmp_path / "run"
    nodes = ["launch=torchrun", "launch.nodes=2", "launch.procs_per_node=1", "launch.torchrun.host=127.0.0.1"]
    first = start("train", *BRIEF, *nodes, f"launch.port={free_port()}", "train.max_steps=100000", cwd=tmp_path)
    wait_for(lambda: (run / "logs/launcher.log").exists(), first)
    command = [sys.executable, "-m", "anyshard.launch.node", str(run), "--node-rank=1"]
    second = subprocess.Popen(
        command, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: steps(run), first)
    second.terminate()  # on any node: all stop together
    code, out, err = finish(second)
    assert code == 75, out + err
    code, out, err = finish(first)
    assert code == 75, out + err
    assert f"{sys.executable} -m anyshard.launch.node {run} --node-rank=1" in err
    assert happened(run, "stop")[0]["reason"] == "signal SIGTERM"
    assert (run / "logs/launcher-node001.log").exists()


def test_torchrun_starts_failed_ranks_again_and_they_go_on(tmp_path):
    """Its restarts, with `resume=never`, which holds for the first attempt alone; a stop is none of its failures."""
    run = tmp_path / "run"
    options = ["launch=torchrun", "launch.procs_per_node=2", "launch.torchrun.max_restarts=1", "resume=never"]
    process = start("train", *BRIEF, *options, "train.max_steps=100000", "checkpoint.every_steps=5", cwd=tmp_path)
    wait_for(lambda: len(happened(run, "commit")) >= 2, process)
    os.kill(rank_pids(process)[1], signal.SIGKILL)
    restored = wait_for(lambda: happened(run, "restore"), process)
    assert restored[0]["step"] >= 10
    seen = len(steps(run))
    wait_for(lambda: len(steps(run)) > seen, process)
    process.terminate()
    code, out, err = finish(process)
    assert code == 75, out + err
    assert [event["world_size"] for event in happened(run, "start")] == [2, 2]


@pytest.mark.parametrize("mpirun", ["mpirun.openmpi"])
def test_mpirun_by_hand(tmp_path, mpirun):
    if shutil.which(mpirun) is None:
        pytest.skip(f"{mpirun} is not installed: apt-get install openmpi-bin")
    options = ["--allow-run-as-root", "--oversubscribe", "-n", "2"]
    command = [mpirun, *options, sys.executable, "-m", "anyshard.trainer.run", *BRIEF]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert happened(tmp_path / "run", "start")[0]["world_size"] == 2


@pytest.mark.slow  # torchrun waits half a minute for a node that might come back
def test_the_nodes_that_are_left_go_on_without_the_lost_one(tmp_path):
    run = tmp_path / "run"
    nodes = ["launch=torchrun", "launch.nodes=2", "launch.min_nodes=1", "launch.procs_per_node=1", "launch.max_restarts=3"]
    more = [
        "launch.torchrun.host=127.0.0.1",
        f"launch.port={free_port()}",
        "train.max_steps=100000",
        "checkpoint.every_steps=5",
    ]
    first = start("train", *BRIEF, *nodes, *more, cwd=tmp_path)
    wait_for(lambda: (run / "logs/launcher.log").exists(), first)
    command = [sys.executable, "-m", "anyshard.launch.node", str(run), "--node-rank=1"]
    second = subprocess.Popen(
        command, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for(lambda: len(happened(run, "commit")) >= 2, first)
    assert happened(run, "start")[0]["world_size"] == 2
    family = [second.pid, *(child.pid for child in psutil.Process(second.pid).children(recursive=True))]
    for pid in family:
        os.kill(pid, signal.SIGKILL)
    second.wait()
    restored = wait_for(lambda: happened(run, "restore"), first, timeout_s=180)
    assert restored[0]["step"] >= 10
    assert (restored[0]["saved_layout"]["dp"], restored[0]["layout"]["dp"]) == (2, 1)
    seen = len(steps(run))
    wait_for(lambda: len(steps(run)) > seen, first)
    first.terminate()
    code, out, err = finish(first)
    assert code == 75, out + err
    tokens = {record["tokens"] // record["step"] for record in steps(run)}
    assert len(tokens) == 1  # the global batch is what it was
