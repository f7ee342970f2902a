"""`launch=local` when its own processes are killed, when people are impatient, and when two start at once."""

from __future__ import annotations

import os
import signal
import time

import psutil
import pytest
import yaml
from helpers.cli import SMOKE, anyshard, finish, happened, rank_pids, start, steps, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.sampled(4, of="launcher")]

ENDLESS = [*SMOKE, "run.dir=run", "train.max_steps=100000", "checkpoint.every_steps=0", "train.eval_every_steps=0"]


def training(tmp_path, *more):
    process = start("train", *ENDLESS, *more, cwd=tmp_path)
    wait_for(lambda: len(steps(tmp_path / "run")) >= 2, process)
    ranks = [psutil.Process(pid) for pid in rank_pids(process)]
    assert len(ranks) == 2
    return process, ranks


def test_killed_torchrun_leaves_ranks_that_save_and_end(tmp_path):
    process, ranks = training(tmp_path)
    (torchrun,) = {rank.ppid() for rank in ranks}
    os.kill(torchrun, signal.SIGKILL)
    code, _, err = finish(process)
    assert code == 75, err
    assert len(happened(tmp_path / "run", "commit")) == 1


def test_a_killed_launcher_leaves_ranks_that_save_and_end(tmp_path):
    process, ranks = training(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    _, alive = psutil.wait_procs(ranks, timeout=60)
    assert not alive
    (stop,), (commit,) = happened(tmp_path / "run", "stop"), happened(tmp_path / "run", "commit")
    assert stop["step"] == commit["step"]
    resumed = anyshard("resume", "run", f"stop.at_step={stop['step'] + 2}", cwd=tmp_path)
    assert f"at step {stop['step']} (the same layout)" in resumed.stdout, resumed.stderr


def test_a_closed_terminal_is_a_stop(tmp_path):
    process, _ = training(tmp_path)
    process.send_signal(signal.SIGHUP)
    assert finish(process)[0] == 75
    assert happened(tmp_path / "run", "stop")[0]["reason"] == "signal SIGHUP"


def test_the_third_ctrl_c_ends_without_a_save(tmp_path):
    process, ranks = training(tmp_path)
    ranks[1].suspend()  # it hangs, so that the other waits for it
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    code, _, err = finish(process)
    assert code == 1
    assert "press once more to end without" in err
    assert "ended without a save, as asked" in err
    assert not psutil.wait_procs(ranks, timeout=10)[1]
    assert not happened(tmp_path / "run", "commit")


def test_of_two_starts_in_one_folder_one_trains_its_own_configuration(tmp_path):
    """Whoever is second is refused before it writes: the first trains what it froze itself."""
    both = {seed: start("train", *ENDLESS, f"seed={seed}", "stop.at_step=10", cwd=tmp_path) for seed in (1, 2)}
    ends = {seed: finish(process, timeout_s=120) for seed, process in both.items()}
    codes = {seed: code for seed, (code, _, _) in ends.items()}
    assert sorted(codes.values()) in ([2, 75], [3, 75]), ends
    (winner,) = [seed for seed, code in codes.items() if code == 75]
    (loser,) = [seed for seed in codes if seed != winner]
    assert "run.dir" in ends[loser][2]
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["seed"] == winner
    assert len(happened(tmp_path / "run", "start")) == 1


def test_a_crash_drains_shared_memory_to_the_disk(tmp_path):
    from anyshard.trainer.checkpoint import ram

    process, ranks = training(tmp_path, "checkpoint.ram_every_steps=1")
    memory = ram.folder_of(tmp_path / "run")
    wait_for(lambda: ram.newest_step(memory) >= 3, process)
    ranks[1].kill()
    code, _, err = finish(process)
    assert code == 1, err
    assert "the newest state was in memory, and is now in" in err
    assert not memory.exists()
    saved = ram.newest_step(tmp_path / "run" / "checkpoints")
    assert saved >= 3
    done = anyshard("resume", "run", f"train.max_steps={saved + 1}", "checkpoint.ram_every_steps=0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert happened(tmp_path / "run", "restore")[-1]["step"] == saved
