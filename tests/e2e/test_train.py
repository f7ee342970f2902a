"""`anyshard train` and `resume` from end to end, on two ranks."""

from __future__ import annotations

import json
import os
import signal

import pytest
from helpers.cli import SMOKE, anyshard, events, finish, happened, plugin, rank_pids, start, steps, wait_for

pytestmark = pytest.mark.e2e


def test_train_then_resume_on_another_layout(tmp_path):
    done = anyshard(
        "train",
        *SMOKE,
        "run.dir=run",
        "callbacks.curves={}",
        "callbacks.sample_text={num_tokens: 8}",
        "callbacks.unigram={}",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for line in (
        "batch: 8 sequences = 4 micro x 1 accumulation x 2 dp",
        "step 20/20 100%",
        "eval at step 20: loss",
        "unigram_perplexity",
        "sample at step 20",
        "plot: ",
    ):
        assert line in done.stdout
    run = tmp_path / "run"
    for name in (
        "config.yaml",
        "overrides.yaml",
        "ds_config.json",
        "plan.json",
        "env.json",
        "metrics.jsonl",
        "events.jsonl",
        "curves.png",
        "curves.csv",
    ):
        assert (run / name).stat().st_size > 0
    assert sorted(path.name for path in (run / "logs").glob("rank*.log")) == ["rank00000.log", "rank00001.log"]
    assert events(run)[0]["event"] == "start"
    assert events(run)[-1]["event"] == "done"

    resumed = anyshard("resume", "run", "zero=z3", "launch.procs_per_node=1", "train.max_steps=24", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "saved under dp 2, ZeRO 1, now dp 1, ZeRO 3" in resumed.stdout
    assert [record["step"] for record in steps(run)][-1] == 24

    again = anyshard("resume", "run", cwd=tmp_path)
    assert again.returncode == 0
    assert "nothing is left to train" in again.stdout

    listed = anyshard("ckpt", "ls", "run", "--json", cwd=tmp_path)
    assert listed.returncode == 0
    assert "step-00000024" in listed.stdout
    assert anyshard("ckpt", "verify", "run", cwd=tmp_path).returncode == 0
    assert "done" in anyshard("runs", "ls", ".", cwd=tmp_path).stdout
    assert anyshard("runs", "plot", "run", "-o", "two.png", cwd=tmp_path).returncode == 0
    assert (tmp_path / "two.png").read_bytes()[:4] == b"\x89PNG"


def test_wandb_offline_continues_one_run(tmp_path):
    for overrides in (["stop.at_step=5"], []):
        done = anyshard("train", *SMOKE, "launch.procs_per_node=1", "tracking=wandb", "run.dir=run", *overrides, cwd=tmp_path)
        assert done.returncode == (75 if overrides else 0), done.stderr
    run_id = (tmp_path / "run" / "wandb_id").read_text()
    assert len(list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{run_id}"))) == 2


@pytest.mark.sampled(2)
@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "STOP"])
def test_a_stop_while_training_saves_and_exits_75(tmp_path, how):
    run = tmp_path / "run"
    process = start(
        "train",
        *SMOKE,
        "run.dir=run",
        "train.max_steps=100000",
        "checkpoint.every_steps=0",
        "train.eval_every_steps=0",
        cwd=tmp_path,
    )
    wait_for(lambda: len(steps(run)) >= 2, process)
    if how == "STOP":
        assert anyshard("runs", "stop", "run", cwd=tmp_path).returncode == 0
    else:
        process.send_signal(getattr(signal, how))
    code, _, err = finish(process)
    assert code == 75, err
    (stop,), (commit,) = happened(run, "stop"), happened(run, "commit")
    assert stop["step"] == commit["step"]
    assert how in stop["reason"]
    resumed = anyshard("resume", "run", f"stop.at_step={stop['step'] + 2}", cwd=tmp_path)
    assert resumed.returncode == 75, resumed.stderr
    assert f"at step {stop['step']} (the same layout)" in resumed.stdout


def test_a_stop_by_the_clock(tmp_path):
    done = anyshard(
        "train", *SMOKE, "run.dir=run", "train.max_steps=100000", "stop.at_s=8", "train.eval_every_steps=0", cwd=tmp_path
    )
    assert done.returncode == 75, done.stderr
    assert happened(tmp_path / "run", "stop")[0]["reason"] == "stop.at_s=8"


def test_a_save_on_request_goes_on(tmp_path):
    run = tmp_path / "run"
    process = start(
        "train",
        *SMOKE,
        "run.dir=run",
        "train.max_steps=100000",
        "checkpoint.every_steps=0",
        "train.eval_every_steps=0",
        cwd=tmp_path,
    )
    wait_for(lambda: len(steps(run)) >= 2, process)
    assert anyshard("runs", "save", "run", cwd=tmp_path).returncode == 0
    (commit,) = wait_for(lambda: happened(run, "commit"), process)
    wait_for(lambda: steps(run)[-1]["step"] > commit["step"] + 5, process)
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 75


@pytest.mark.sampled(1)
@pytest.mark.parametrize("phase", ["compose", "start", "data"])
def test_ctrl_c_before_the_first_step_loses_nothing(tmp_path, phase):
    run = tmp_path / "run"
    process = start("train", *SMOKE, "run.dir=run", f"data.cache_dir={tmp_path}/cache", "train.max_steps=100000", cwd=tmp_path)
    if phase == "start":
        wait_for(lambda: len(rank_pids(process)) == 2, process)
    elif phase == "data":
        wait_for(lambda: happened(run, "start"), process)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 75 if phase != "compose" else code in (75, 130, -signal.SIGINT), err
    assert "Traceback" not in err
    saved = list((run / "checkpoints").glob("*")) if (run / "checkpoints").exists() else []
    assert bool(saved) == bool(happened(run, "commit"))  # on a slow day the first step was over before the signal


def test_a_killed_rank_ends_the_run_and_the_next_start_continues(tmp_path):
    run = tmp_path / "run"
    process = start(
        "train",
        *SMOKE,
        "run.dir=run",
        "train.max_steps=100000",
        "checkpoint.every_steps=10",
        "train.eval_every_steps=0",
        cwd=tmp_path,
    )
    wait_for(lambda: len(happened(run, "commit")) >= 2, process)
    os.kill(rank_pids(process)[1], signal.SIGKILL)
    code, _, err = finish(process)
    assert code == 1
    assert "rank 1" in err
    assert "SIGKILL" in err
    assert "step-" in err  # names the last good checkpoint
    assert rank_pids_gone(run)
    resumed = anyshard("resume", "run", "stop.at_step=100000", "stop.at_s=6", cwd=tmp_path)
    assert resumed.returncode == 75, resumed.stderr
    assert "resumed from" in resumed.stdout


def rank_pids_gone(run):
    import psutil

    return not any(str(run) in " ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))


def at_step_3_of_rank_1(body):
    return f"""
        def on_step_end(self, trainer, record):
            if trainer.rank == 1 and trainer.progress.step == 3:
                {body}
    """


DOZING = """
    def doze(self, phase):
        if os.environ["DOZE_IN"] == phase:
            Path(os.environ["DOZE_IN"]).touch()
            time.sleep(4)

    def on_evaluation(self, trainer, record):
        self.doze("evaluation")

    def state_dict(self):
        return {"dozes": True}

    def load_state_dict(self, state):
        self.doze("restore")
"""


def test_ctrl_c_while_evaluating_restoring_and_saving(tmp_path):
    """One run, stopped three times: each loses nothing, and the next start goes on where it was."""
    run, env = tmp_path / "run", plugin(tmp_path, "dozing", DOZING)

    def interrupt(command, condition, doze_in):
        process = start(*command, cwd=tmp_path, env={**env, "DOZE_IN": doze_in})
        wait_for(condition, process)
        before = len(happened(run, "commit"))
        saving = len(happened(run, "save_begin")) - before
        process.send_signal(signal.SIGINT)
        code, out, err = finish(process, timeout_s=120)
        assert code == 75, err
        assert "Traceback" not in err
        return out, saving, [commit["step"] for commit in happened(run, "commit")[before:]]

    endless = ["train.max_steps=100000", "checkpoint.every_steps=0", "train.eval_every_steps=4", "callbacks.dozing={}"]
    evaluating = (tmp_path / "evaluation").exists
    _, _, committed = interrupt(["train", *SMOKE, "run.dir=run", *endless], evaluating, "evaluation")
    (stop,) = happened(run, "stop")
    assert committed == [stop["step"]]
    assert '"eval/loss"' in (run / "metrics.jsonl").read_text()  # it came to its end

    _, _, committed = interrupt(["resume", "run"], (tmp_path / "restore").exists, "restore")
    assert committed == []
    assert happened(run, "restore") == []  # that did not
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == [f"step-{stop['step']:08d}"]

    slow = ["checkpoint.every_steps=100", "checkpoint.bandwidth_mib_s=0.1", "train.eval_every_steps=0"]
    out, saving, committed = interrupt(["resume", "run", *slow], lambda: len(happened(run, "save_begin")) > 1, "never")
    assert f"at step {stop['step']} (the same layout)" in out
    begun, last = happened(run, "save_begin")[-2:]
    assert saving == 1  # it takes ten seconds at this rate, unless somebody waits for it
    assert committed == [begun["step"], last["step"]]
    assert last["step"] == happened(run, "stop")[-1]["step"]
    assert anyshard("ckpt", "verify", "run", cwd=tmp_path).returncode == 0


def test_a_failing_rank_shows_its_own_error_and_nothing_above_it(tmp_path):
    """Rank 1 alone fails, in user code; rank 0 then fails in a collective, which nobody needs to read."""
    env = plugin(tmp_path, "failing", at_step_3_of_rank_1("raise LookupError('page 17 is missing')"))
    done = anyshard("train", *SMOKE, "run.dir=run", "callbacks.failing={}", cwd=tmp_path, env=env)
    assert done.returncode == 1
    assert done.stderr.startswith("TrainError: callbacks.failing failed in on_step_end: LookupError('page 17 is missing')")
    assert "Traceback" not in done.stderr
    assert "Connection" not in done.stderr


def test_ranks_that_hang_say_where_they_stand(tmp_path):
    """Rank 1 sleeps in user code, rank 0 waits for it; when it is awake again the run goes on."""
    env = plugin(tmp_path, "dozing", at_step_3_of_rank_1("time.sleep(6)"))
    options = ["train.detect_hang_s=2", "callbacks.dozing={}", "train.max_steps=6"]
    done = anyshard("train", *SMOKE, "run.dir=run", *options, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert "WARNING: no micro-step has ended for" in done.stdout
    run = tmp_path / "run"
    assert 3 <= happened(run, "hang")[0]["step"] <= 5
    assert "in on_step_end" in (run / "logs" / "rank00001.log").read_text()
    assert "most recent call first" in (run / "logs" / "rank00000.log").read_text()


def test_by_hand_under_torchrun(tmp_path):
    """With overrides: rank 0 composes and freezes for all. With --run-dir: what is frozen."""
    from helpers.cli import environment, subprocess, sys

    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "anyshard.trainer.run",
    ]
    first = subprocess.run(
        [*torchrun, "debug=smoke", "run.dir=run"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert first.returncode == 0, first.stderr
    assert "step 20/20 100%" in first.stdout
    assert first.stdout.startswith("run: ")  # nothing of DeepSpeed's above it
    assert "DeepSpeed" not in first.stderr
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["world_size"] == 2
    assert json.loads((tmp_path / "run" / "env.json").read_text())["packages"]["deepspeed"]
    assert (tmp_path / "run" / "overrides.yaml").read_text() == "- overrides:\n  - debug=smoke\n  - run.dir=run\n"
    assert sorted(path.name for path in (tmp_path / "run" / "logs").iterdir()) == ["rank00000.log", "rank00001.log"]
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert "procs_per_node: 2" in config
    assert json.loads((tmp_path / "run" / "ds_config.json").read_text())["train_batch_size"] == 8
    second = subprocess.run(
        [*torchrun, "--run-dir", "run"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert second.returncode == 0, second.stderr
    fewer = [*torchrun, "debug=smoke", "run.dir=other", "launch.procs_per_node=4"]
    refused = subprocess.run(fewer, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=180, check=False)
    assert refused.returncode != 0
    assert "launch.procs_per_node=4" in refused.stderr
    assert not (tmp_path / "other").exists()


def test_dry_run_writes_nothing(tmp_path):
    done = anyshard("train", *SMOKE, "run.dir=run", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "torch.distributed.run --nproc-per-node=2" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_is_one_launch_after_the_other(tmp_path):
    done = anyshard("train", *SMOKE, "-m", "zero=z0,z1", "launch.procs_per_node=1", "train.max_steps=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("multirun/*/*/metrics.jsonl"))) == 2


def test_a_sweep_ends_with_the_run_that_somebody_stops(tmp_path):
    process = start("train", *SMOKE, "-m", "seed=1,2", "launch.procs_per_node=1", "train.max_steps=100000", cwd=tmp_path)
    (metrics,) = wait_for(lambda: list(tmp_path.glob("multirun/*/0/metrics.jsonl")), process)
    wait_for(lambda: steps(metrics.parent), process)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 75
    assert "stopped: the other 1 runs of the sweep are not started" in err
    assert not list(tmp_path.glob("multirun/*/1"))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("example", ["vision_classifier", "masked_lm"])
def test_examples_train_save_and_resume_at_dp_2_zero_3(tmp_path, example):
    from pathlib import Path

    from helpers.cli import environment, subprocess, sys

    script = Path(__file__).parents[2] / "examples" / f"{example}.py"
    assert len(script.read_text().rstrip().splitlines()) < 40
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
        "zero=z3",
        f"run.dir={tmp_path}/run",
    ]
    first = subprocess.run(
        [*torchrun, "stop.at_step=30"], env=environment(), capture_output=True, text=True, timeout=180, check=False
    )
    assert first.returncode == 0, first.stderr
    second = subprocess.run(torchrun, env=environment(), capture_output=True, text=True, timeout=180, check=False)
    assert second.returncode == 0, second.stderr
    assert "at step 30 (the same layout)" in second.stdout
    losses = [record["train/loss"] for record in steps(tmp_path / "run")]
    assert losses[-1] < 0.8 * losses[0]
    assert "accuracy" in second.stdout
