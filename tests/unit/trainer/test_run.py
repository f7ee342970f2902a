import pytest

from anyshard.trainer import run
from anyshard.trainer.run import stop_code


@pytest.mark.parametrize(
    ("environ", "code"), [({}, 75), ({"TORCHELASTIC_MAX_RESTARTS": "0"}, 75), ({"TORCHELASTIC_MAX_RESTARTS": "3"}, 0)]
)
def test_torchrun_that_restarts_ranks_does_not_restart_one_that_was_asked_to_stop(environ, code):
    assert stop_code(environ) == code


@pytest.mark.parametrize(
    ("overrides", "timeout_s"),
    [
        ([], None),
        (["launch.timeout_s=30"], 30.0),
        (["+launch.timeout_s=1", "launch.timeout_s=2"], 2.0),
        (["launch.timeout_s=x"], None),
    ],
)
def test_the_time_to_meet_is_read_from_the_command_line(overrides, timeout_s):
    assert run._timeout_s(overrides) == timeout_s
