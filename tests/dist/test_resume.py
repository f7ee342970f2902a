"""2N steps against N steps, a new process and N steps: bit-identical on the same layout, 1e-5 on another."""

from __future__ import annotations

import json

import pytest
from helpers.fitting import train

pytestmark = pytest.mark.dist

BASE = ["train.max_steps=12", "train.global_batch_size=8", "train.micro_batch_size=2", "schedule.warmup_steps=3"]
SAVE = ["checkpoint.at_end=true"]
DROPOUT = ["model.config.attention_dropout=0.1"]


def columns(records, names=("train/loss", "train/lr", "train/grad_norm", "tokens")):
    return [tuple(record[name] for name in names) for record in records]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("stage", "offload"), [(0, "none"), (1, "none"), (2, "cpu"), (3, "none"), (3, "cpu")])
def test_the_same_layout_resumes_bit_for_bit(tmp_path, stage, offload):
    """With dropout on, so that the random number generators count too, and accumulation."""
    base = [*BASE, *DROPOUT, f"zero=z{stage}", f"offload={offload}"]
    whole = train(tmp_path / "whole", base, 2)
    train(tmp_path / "run", [*base, *SAVE, "stop.at_step=6"], 2)
    resumed = train(tmp_path / "run", [*base, *SAVE], 2)
    assert [record["step"] for record in resumed] == list(range(1, 13))
    assert columns(resumed) == columns(whole)


LAYOUTS = [(1, 0, "none"), (2, 1, "none"), (2, 2, "cpu"), (2, 3, "none"), (4, 3, "cpu"), (4, 2, "none"), (1, 3, "none")]
PAIRS = [(a, LAYOUTS[(number + jump) % len(LAYOUTS)]) for number, a in enumerate(LAYOUTS) for jump in (1, 3)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return [r["train/loss"] for r in train(tmp_path_factory.mktemp("whole"), [*BASE, "zero=z0"], 1)]


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_another_layout_continues_the_same_curve(tmp_path, whole, first, second):
    def options(layout):
        _, stage, offload = layout
        return [*BASE, *SAVE, f"zero=z{stage}", f"offload={offload}"]

    train(tmp_path, [*options(first), "stop.at_step=6"], first[0])
    resumed = train(tmp_path, options(second), second[0])
    assert [record["step"] for record in resumed] == list(range(1, 13))
    assert [record["train/loss"] for record in resumed] == pytest.approx(whole, rel=1e-5)
    restore = next(e for e in map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines()) if e["event"] == "restore")
    assert (restore["step"], restore["saved_layout"]["dp"], restore["layout"]["dp"]) == (6, first[0], second[0])


def test_resuming_names_what_could_not_be_restored_exactly(tmp_path):
    train(tmp_path, [*BASE, *SAVE, "stop.at_step=2"], 2)
    train(tmp_path, [*BASE, *SAVE, "stop.at_step=4"], 1)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    (restore,) = [event for event in events if event["event"] == "restore"]
    assert any("random number generators" in note for note in restore["notes"])


BRANCH = ["train.max_steps=4", "checkpoint.every_steps=1", "checkpoint.keep=0"]


def names(folder):
    """The checkpoints of a run, and how many of each step were set aside."""
    found = sorted(path.name for path in folder.glob("step-*"))
    aside = sorted(name.partition(".")[0] for name in found if ".abandoned-" in name)
    return [name for name in found if "." not in name], aside


STEPS = [f"step-{step:08d}" for step in range(1, 7)]


def test_a_run_that_starts_anew_does_not_find_its_old_checkpoints(tmp_path):
    first = train(tmp_path, [*BASE, *SAVE, *BRANCH], 1)
    again = train(tmp_path, [*BASE, *SAVE, *BRANCH, "resume=never", "stop.at_step=2"], 1)
    folder = tmp_path / "checkpoints"
    assert names(folder) == (STEPS[:2], STEPS[:4])
    assert columns(again[-2:]) == columns(first[:2])
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    (aside,) = [event for event in events if event["event"] == "set_aside"]
    assert len(aside["names"]) == 4
    train(tmp_path, [*BASE, *SAVE, *BRANCH], 1)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "restore"] == [2]


def test_a_run_that_goes_back_continues_from_there(tmp_path):
    """And a crash after that finds the new branch; the run ends as one that never left it."""
    whole = train(tmp_path / "whole", [*BASE, *BRANCH, "train.max_steps=6"], 1)
    run, folder = tmp_path / "run", tmp_path / "run" / "checkpoints"
    train(run, [*BASE, *SAVE, *BRANCH, "train.max_steps=6", "stop.at_step=4"], 1)
    back = ["train.max_steps=6", f"resume={folder / STEPS[1]}", "stop.at_step=3"]
    train(run, [*BASE, *SAVE, *BRANCH, *back], 1)
    assert names(folder) == (STEPS[:3], STEPS[2:4])
    resumed = train(run, [*BASE, *SAVE, *BRANCH, "train.max_steps=6"], 1)
    assert names(folder) == (STEPS, STEPS[2:4])
    assert columns(resumed[-3:]) == columns(whole[-3:])
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "restore"] == [2, 3]
