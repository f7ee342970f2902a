"""What every registered callback must do: build with its defaults, keep its state as JSON, run on all ranks at ZeRO-3."""

from __future__ import annotations

import json

import pytest
from helpers.fitting import train
from helpers.ranks import run_ranks

from anyshard.configs import registry
from anyshard.trainer.callbacks.base import Callback, Callbacks

NAMES = registry.names("callback")


@pytest.mark.parametrize("name", NAMES)
def test_builds_with_its_defaults_and_keeps_its_state_as_json(name):
    callbacks = Callbacks.build({name: {}})
    assert isinstance(callbacks.members[name], Callback)
    state = json.loads(json.dumps(callbacks.state_dict()))
    fresh = Callbacks.build({name: {}})
    assert fresh.load_state_dict(state) == []
    assert fresh.state_dict() == callbacks.state_dict()


@pytest.mark.parametrize("name", NAMES)
def test_has_a_description(name):
    assert registry.lookup("callback", name, key="callbacks").__doc__


@pytest.mark.dist
@pytest.mark.parametrize("name", NAMES)
def test_runs_on_two_ranks_at_zero_3_and_does_not_change_the_training(tmp_path, name):
    """A callback that ran the model on rank 0 alone would hang here; one that drew random numbers would change the losses."""
    base = [
        "zero=z3",
        "train.max_steps=8",
        "train.eval_every_steps=4",
        "train.eval_samples=4",
        "model.config.attention_dropout=0.1",
    ]
    plain = [record["train/loss"] for record in train(tmp_path / "plain", base, 2)]
    watched = [record["train/loss"] for record in train(tmp_path / "watched", [*base, f"callbacks.{name}={{}}"], 2)]
    assert watched == plain
    assert run_ranks(_alive, 2) == [True, True]


def _alive() -> bool:
    return True
