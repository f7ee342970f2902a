"""Ranks agree on wishes: one rank has them, all act at the same micro-step."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from helpers.cli import events
from helpers.fitting import TINY, curve, records, train
from helpers.ranks import run_ranks

from anyshard.configs import schema
from anyshard.trainer.signals import Signals
from anyshard.trainer.stop import AGREE_EVERY_S, StopControl

pytestmark = pytest.mark.dist


def _steps_until(what: str, run_dir: str, step_s: float, wish_at: int) -> tuple[int, int]:
    """The step at which this rank is told to save or stop, and how many agreements there were."""
    signals = Signals(training=True)
    group = dist.new_group(backend="gloo")
    stops = StopControl(schema.Stop(), Path(run_dir), signals, group, dist.get_rank())
    begun, last = 0, None
    for step in range(1, 2000):
        time.sleep(step_s * (1 + dist.get_rank()))
        if step == wish_at and what == "signal" and dist.get_rank() == 1:
            signals.received = 15
        if step == wish_at and what == "SAVE" and dist.get_rank() == 0:
            (Path(run_dir) / "SAVE").touch()
        decision = stops.decide(step)
        begun, last = begun + (stops._work is not last), stops._work
        if decision.stop or decision.save:
            stops.drain()
            return step, begun
    raise AssertionError("nothing was decided")


@pytest.mark.parametrize("what", ["signal", "SAVE"])
def test_short_steps_share_an_agreement_and_all_ranks_act_at_the_same_step(tmp_path, what):
    (step, agreements), (other, _) = run_ranks(_steps_until, 2, what=what, run_dir=str(tmp_path), step_s=0.002, wish_at=100)
    assert step == other
    assert 100 < step <= 100 + 3 * AGREE_EVERY_S / 0.002
    assert agreements < step / 2


def test_steps_that_take_long_agree_each_time_and_act_one_step_later(tmp_path):
    steps = run_ranks(_steps_until, 2, what="signal", run_dir=str(tmp_path), step_s=AGREE_EVERY_S, wish_at=4)
    assert [step for step, _ in steps] == [5, 5]


RUN = ["train.global_batch_size=32", "train.micro_batch_size=2", "train.max_steps=6", "zero=z2"]  # 8 micro-steps on 2 ranks


def _fit_with_a_signal(overrides: list[str], at_micro_step: int | None, at_batch: int | None) -> dict[str, Any]:
    """Train; rank 1 alone gets SIGTERM after so many micro-steps, or batches of evaluations."""
    from anyshard import compose, fit
    from anyshard.trainer import stop
    from anyshard.trainer.engine import Engine
    from anyshard.trainer.trainer import Trainer

    signals, counts = Signals(), {"micro_steps": 0, "batches": 0}
    finish, evaluated, pace = Engine.finish_micro_step, Trainer._evaluated_batch, stop.AGREE_EVERY_S

    def count(what: str, at: int | None) -> None:
        counts[what] += 1
        if counts[what] == at and dist.get_rank() == 1:
            signals.received = 15

    def finish_and_count(engine: Engine) -> None:
        finish(engine)
        count("micro_steps", at_micro_step)

    def evaluate_and_count(trainer: Trainer) -> None:
        count("batches", at_batch)
        evaluated(trainer)

    Engine.finish_micro_step, Trainer._evaluated_batch, stop.AGREE_EVERY_S = finish_and_count, evaluate_and_count, 0.0
    try:
        outcome = fit(compose([*TINY, *RUN, *overrides]), signals=signals)
    finally:
        Engine.finish_micro_step, Trainer._evaluated_batch, stop.AGREE_EVERY_S = finish, evaluated, pace
    return {"step": outcome.step, "stopped": outcome.stopped, **counts}


def test_a_wish_ends_a_step_in_its_middle_and_the_run_goes_on_as_if_nothing_had_been(tmp_path):
    undisturbed = curve(tmp_path / "a", RUN, 2)
    run = tmp_path / "b"
    overrides = [f"run.dir={run}", "model.config.attention_dropout=0.1"]
    dropped = curve(tmp_path / "c", [*RUN, overrides[1]], 2)
    assert dropped != undisturbed  # the random numbers of the dropout have to be the same after a stop
    # 3 steps of 8, and the second micro-step of the fourth: wished there, agreed at the third
    ends = run_ranks(_fit_with_a_signal, 2, overrides=overrides, at_micro_step=26, at_batch=None)
    assert [end["stopped"] for end in ends] == ["signal SIGTERM"] * 2
    assert [(end["step"], end["micro_steps"]) for end in ends] == [(3, 27)] * 2
    (stop,) = [event for event in events(run) if event["event"] == "stop"]
    assert stop["step"] == 3
    train(run, [*RUN, overrides[1]], 2)
    assert [record["train/loss"] for record in records(run)] == dropped
    tokens = [record["tokens"] for record in records(run)]
    assert tokens == [tokens[0] * step for step in range(1, 7)]


def test_a_wish_ends_an_evaluation_which_the_next_start_does_again(tmp_path):
    run = tmp_path / "run"
    overrides = [f"run.dir={run}", "train.eval_samples=16", "train.eval_every_steps=2"]
    ends = run_ranks(_fit_with_a_signal, 2, overrides=overrides, at_micro_step=None, at_batch=1)
    assert [(end["step"], end["stopped"], end["batches"]) for end in ends] == [(2, "signal SIGTERM", 2)] * 2  # of 4
    assert evaluations(run) == []
    train(run, [*RUN, *overrides[1:]], 2)
    assert evaluations(run) == [2, 4, 6]


def test_a_stop_in_the_first_step_has_nothing_to_save(tmp_path):
    ends = run_ranks(_fit_with_a_signal, 2, overrides=[f"run.dir={tmp_path / 'run'}"], at_micro_step=1, at_batch=None)
    assert [(end["step"], end["stopped"]) for end in ends] == [(0, "signal SIGTERM")] * 2
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


def evaluations(run: Path) -> list[int]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "eval/loss" in line]
