"""A real Slurm of two nodes: submitted, warned, requeued, resumed, cancelled; and ranks that are started by hand with srun."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from helpers.cli import anyshard, environment, happened, steps
from helpers.slurm import Cluster, end_jobs, slurm_cluster, why_not

from anyshard.launch.slurm import submitted_job

pytestmark = [pytest.mark.e2e, pytest.mark.sampled(3, of="slurm")]

LONG = ["train.max_steps=100000", "train.eval_every_steps=0", "checkpoint.every_steps=0", "train.log_every_steps=10"]
SOON = "StartTime=now+4"
"""For a requeued job, instead of two minutes: a node refuses a job that comes back in the second in which it was ended."""
TWO_NODES = ["debug=smoke", "launch=slurm", "cluster=cpu", "launch.nodes=2", "launch.procs_per_node=1"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short: a socket's path has 108 characters
    try:
        with slurm_cluster(folder) as running:
            yield running
        assert left_of(folder) == []
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def _no_job_is_left(cluster: Cluster) -> Iterator[None]:
    yield
    end_jobs(cluster)


def left_of(folder: Path) -> list[str]:
    """Processes that were started for the cluster in this folder, or by it, and still live."""
    left = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and str(folder) in process.environ().get("SLURM_CONF", ""):
                left.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return left


def submit(cluster: Cluster, cwd: Path, *overrides: str) -> str:
    """Submit a run as a person does; returns the job."""
    done = anyshard("train", *TWO_NODES, "run.dir=run", *overrides, cwd=cwd, env=cluster.env)
    assert done.returncode == 0, done.stdout + done.stderr
    job = str(json.loads((cwd / "run/slurm.json").read_text())["job_id"])
    assert f"job {job} is in the queue: 2 nodes x 1 ranks" in done.stdout
    assert "anyshard runs tail" in done.stdout
    return job


def wait_for_step(run: Path, step: int, timeout_s: float = 150) -> None:
    until = time.monotonic() + timeout_s
    while not any(record["step"] >= step for record in steps(run)):
        assert time.monotonic() < until, "\n".join(path.read_text()[-2000:] for path in run.glob("logs/slurm-*.log"))
        time.sleep(0.1)


def output(run: Path, job: str) -> str:
    return (run / "logs" / f"slurm-{job}.log").read_text()


@pytest.mark.parametrize("starter", ["srun", "torchrun"])
def test_a_warned_job_saves_goes_back_into_the_queue_and_continues(cluster, tmp_path, starter):
    run = tmp_path / "run"
    job = submit(cluster, tmp_path, *LONG, f"launch.slurm.starter={starter}", "resume=never")
    wait_for_step(run, 10)
    again = anyshard("train", *TWO_NODES, "run.dir=run", *LONG, cwd=tmp_path, env=cluster.env)
    assert again.returncode == 3
    assert f"job {job} of this run is in the queue already (RUNNING n[1-2])" in again.stderr

    cluster.run("scancel", "--batch", "--signal=USR2", job)  # as Slurm warns before the time limit, or when it preempts
    cluster.wait_for(job, "PENDING")
    stop = happened(run, "stop")[-1]
    assert stop["reason"] == "signal SIGUSR2"
    assert happened(run, "commit")[-1]["step"] == stop["step"]

    cluster.run("scontrol", "update", f"jobid={job}", SOON)
    wait_for_step(run, stop["step"] + 10)
    restored = happened(run, "restore")
    assert [event["step"] for event in restored] == [stop["step"]]
    assert [event["world_size"] for event in happened(run, "start")] == [2, 2]

    (run / "STOP").touch()  # a person's stop is no reason to go on
    cluster.wait_for(job, "COMPLETED", "FAILED")
    told = output(run, job)
    assert "goes back into the queue: it stopped with its state saved (signal SIGUSR2)" in told
    assert "the job ends here: it was asked to stop (file " in told
    assert happened(run, "commit")[-1]["step"] > stop["step"]


def test_a_requeued_job_takes_the_nodes_that_are_left(cluster, tmp_path):
    run = tmp_path / "run"
    job = submit(cluster, tmp_path, *LONG, "launch.min_nodes=1")
    wait_for_step(run, 10)
    cluster.run("scontrol", "update", "nodename=n2", "state=drain", "reason=test")
    try:
        cluster.run("scancel", "--batch", "--signal=USR2", job)
        cluster.wait_for(job, "PENDING")
        stopped = happened(run, "stop")[-1]["step"]
        cluster.run("scontrol", "update", f"jobid={job}", SOON)
        wait_for_step(run, stopped + 10)
    finally:
        cluster.run("scontrol", "update", "nodename=n2", "state=resume")
    restored = happened(run, "restore")[-1]
    assert (restored["step"], restored["saved_layout"]["dp"], restored["layout"]["dp"]) == (stopped, 2, 1)
    assert [event["world_size"] for event in happened(run, "start")] == [2, 1]
    tokens = {record["tokens"] // record["step"] for record in steps(run)}
    assert len(tokens) == 1  # the global batch is what it was
    cluster.run("scancel", job)
    cluster.wait_for(job, "CANCELLED")


def test_scancel_saves_and_ends(cluster, tmp_path):
    run = tmp_path / "run"
    job = submit(cluster, tmp_path, *LONG)
    wait_for_step(run, 10)
    cluster.run("scancel", job)
    cluster.wait_for(job, "CANCELLED")
    until = time.monotonic() + 20
    while not happened(run, "stop") and time.monotonic() < until:
        time.sleep(0.1)
    stop = happened(run, "stop")[-1]
    assert stop["reason"] == "signal SIGTERM"
    assert happened(run, "commit")[-1]["step"] == stop["step"]
    assert cluster.state(job) == "CANCELLED"


def test_srun_by_hand(cluster, tmp_path):
    overrides = ["debug=smoke", "run.dir=run", "launch.nodes=2", "train.eval_every_steps=0"]
    command = ["srun", "-N2", "--ntasks-per-node=1", sys.executable, "-m", "anyshard.trainer.run", *overrides]
    env = environment(**cluster.env)
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert happened(tmp_path / "run", "start")[0]["world_size"] == 2
    assert happened(tmp_path / "run", "done")

    wrong = {**env, "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}
    command[1:1] = ["--kill-on-bad-exit=1"]
    done = subprocess.run(command, cwd=tmp_path, env=wrong, capture_output=True, text=True, timeout=120, check=False)
    assert "the environment says RANK=0 of WORLD_SIZE=2, but srun says SLURM_PROCID=1" in done.stderr
    assert done.returncode != 0


def test_the_time_limit_is_read_by_itself(cluster, tmp_path):
    """Ranks by hand, which nobody warns: they stop before the limit of their job."""
    overrides = ["debug=smoke", "run.dir=run", *LONG, "launch.nodes=2", "stop.margin_s=45"]
    command = ["srun", "-N2", "--ntasks-per-node=1", "--time=1", sys.executable, "-m", "anyshard.trainer.run", *overrides]
    env = environment(**cluster.env)
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 75, done.stdout + done.stderr
    assert happened(tmp_path / "run", "stop")[0]["reason"] == "the time limit of the job"


def ranks_on(cluster: Cluster, node: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            told = process.environ()
            mine = str(cluster.folder) in told.get("SLURM_CONF", "") and told.get("SLURMD_NODENAME") == node
            if mine and "anyshard.trainer.run" in process.cmdline() and "SLURM_PROCID" in told:
                found.append(process)
    return found


@pytest.mark.slow
def test_a_node_on_which_ranks_die_twice_is_left_out(cluster, tmp_path):
    run = tmp_path / "run"
    saves = [*LONG, "checkpoint.every_steps=5", "launch.backoff_s=1", "launch.min_nodes=1"]
    job = submit(cluster, tmp_path, *saves)
    for attempt in (1, 2):
        wait_for(lambda: len(happened(run, "start")) == attempt and happened(run, "commit"), 150)  # noqa: B023
        committed = len(happened(run, "commit"))
        wait_for(lambda: len(happened(run, "commit")) > committed, 60)  # noqa: B023
        (rank,) = ranks_on(cluster, "n2")
        rank.kill()
        if attempt == 1:
            cluster.wait_for(job, "PENDING")
            cluster.run("scontrol", "update", f"jobid={job}", SOON)
    wait_for(lambda: submitted_job(run) != job, 60)
    new = submitted_job(run)
    wait_for(lambda: f"job {new} goes on, without n2" in output(run, job), 20)
    told = output(run, job)
    assert "rank 1 failed on n2" in told
    assert "goes back into the queue: the ranks failed" in told
    assert "n2 has failed twice and is left out" in told
    wait_for(lambda: len(happened(run, "start")) == 3, 150)
    assert happened(run, "start")[-1]["hosts"] == ["n1"]
    cluster.run("scancel", new)


@pytest.mark.slow
def test_a_node_that_fails_is_done_without(cluster, tmp_path):
    """Its slurmd and all that ran there are killed; the job goes on, on the rest and in another layout."""
    run = tmp_path / "run"
    job = submit(cluster, tmp_path, *LONG, "checkpoint.every_steps=5", "launch.min_nodes=1", "launch.backoff_s=1")
    wait_for(lambda: len(happened(run, "commit")) > 1, 150)
    cluster.lose_node("n2")
    try:
        # whoever is first: the script, whose ranks have failed, or Slurm, which misses the node and starts the job anew
        wait_for(lambda: cluster.state(job) == "PENDING" or happened(run, "restore"), 150)
        if cluster.state(job) == "PENDING":
            cluster.run("scontrol", "update", f"jobid={job}", "StartTime=now+15")  # by then Slurm knows it
        wait_for(lambda: happened(run, "restore"), 150)
        restored = happened(run, "restore")[-1]
        assert (restored["saved_layout"]["dp"], restored["layout"]["dp"]) == (2, 1)
        assert happened(run, "start")[-1]["hosts"] == ["n1"]
        wait_for_step(run, restored["step"] + 10)
        cluster.run("scancel", job)
        cluster.wait_for(job, "CANCELLED")
    finally:
        cluster.bring_back("n2")


def test_a_sweep_ends_with_a_table_that_a_job_writes(cluster, tmp_path):
    done = anyshard("train", "-m", *TWO_NODES, "seed=1,2", "launch.nodes=1", "train.max_steps=3", cwd=tmp_path, env=cluster.env)
    assert done.returncode == 0, done.stdout + done.stderr
    (results,) = {line.split()[-1] for line in done.stdout.splitlines() if line.startswith("when all of them have ended")}
    wait_for(lambda: "done" in (Path(results).read_text() if Path(results).exists() else ""), 150)
    table = Path(results).read_text()
    assert table.count("done") == 2
    assert "seed" in table


def wait_for(condition: Callable[[], object], timeout_s: float) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, f"not within {timeout_s} s"
        time.sleep(0.1)
