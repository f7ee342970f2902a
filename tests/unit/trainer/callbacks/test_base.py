import pytest

from anyshard.configs import registry
from anyshard.configs.errors import CheckpointError, ConfigError, TrainError
from anyshard.trainer.callbacks.base import Callback, Callbacks


class Counting(Callback):
    def __init__(self, start=0):
        self.count = start

    def on_step_end(self, trainer, record):
        self.count += 1

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


class Failing(Callback):
    def on_train_start(self, trainer):
        raise KeyError("missing")

    def on_train_end(self, trainer):
        raise CheckpointError("disk")


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(registry._REGISTERED["callback"], "counting", Counting)
    monkeypatch.setitem(registry._REGISTERED["callback"], "failing", Failing)


def test_callbacks_are_built_by_name_and_null_turns_one_off(registered):
    callbacks = Callbacks.build({"counting": {"start": 3}, "failing": None})
    assert list(callbacks.members) == ["counting"]
    callbacks.call("on_step_end", None, None)
    assert callbacks.state_dict() == {"counting": {"count": 4}}


def test_state_goes_back_to_its_owner(registered):
    callbacks = Callbacks.build({"counting": {}})
    assert callbacks.load_state_dict({"counting": {"count": 9}, "gone": {"x": 1}}) == ["gone"]
    assert callbacks.members["counting"].count == 9


def test_an_unknown_callback_gets_a_suggestion(registered):
    with pytest.raises(ConfigError, match="Did you mean counting"):
        Callbacks.build({"countin": {}})


def test_options_that_a_callback_does_not_take(registered):
    with pytest.raises(ConfigError, match=r"callbacks\.counting=.*unexpected keyword argument 'stop'"):
        Callbacks.build({"counting": {"stop": 1}})


def test_a_failure_names_its_callback(registered):
    with pytest.raises(
        TrainError, match=r"callbacks\.failing failed in on_train_start: KeyError\('missing'\).*callbacks\.failing=null"
    ):
        Callbacks.build({"failing": {}}).call("on_train_start", None)


def test_an_error_for_people_passes_as_it_is(registered):
    with pytest.raises(CheckpointError, match="disk"):
        Callbacks.build({"failing": {}}).call("on_train_end", None)


def test_the_base_class_does_nothing():
    callback = Callback()
    callback.on_train_start(None)
    callback.on_step_end(None, None)
    callback.on_evaluation(None, {})
    callback.on_train_end(None)
    callback.load_state_dict({})
    assert callback.state_dict() == {}
