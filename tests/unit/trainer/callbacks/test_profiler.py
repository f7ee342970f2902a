"""Which steps the profiler traces."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from anyshard.trainer.callbacks.profiler import Profiler


def train(run_dir, profiler, *, first, last):
    said = []
    trainer = SimpleNamespace(
        rank=0,
        run_dir=run_dir,
        device=torch.device("cpu"),
        progress=SimpleNamespace(step=first - 1),
        reporter=SimpleNamespace(say=said.append),
    )
    profiler.on_train_start(trainer)
    for step in range(first, last + 1):
        torch.ones(2) + step
        trainer.progress.step = step
        profiler.on_step_end(trainer, None)
    profiler.on_train_end(trainer)
    return said


@pytest.mark.parametrize(
    ("start_step", "first", "traced"),
    [(1, 1, "1 to 2"), (5, 1, "5 to 6"), (5, 100, "100 to 101"), (9, 1, "9 to 9")],
)
def test_the_steps_that_were_asked_for(tmp_path, start_step, first, traced):
    (told,) = train(tmp_path, Profiler(start_step=start_step, num_steps=2), first=first, last=first + 8)
    assert told.startswith(f"profile of steps {traced}:")
    assert json.loads((tmp_path / "profile" / "rank00000.json").read_text())["traceEvents"]
    assert "aten::add" in (tmp_path / "profile" / "rank00000.txt").read_text()


def test_a_run_that_is_too_short_traces_nothing(tmp_path):
    assert train(tmp_path, Profiler(start_step=50), first=1, last=3) == []
    assert not (tmp_path / "profile").exists()
