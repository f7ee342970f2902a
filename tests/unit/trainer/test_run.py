import pytest

from anyshard.trainer.run import stop_code


@pytest.mark.parametrize(
    ("environ", "code"), [({}, 75), ({"TORCHELASTIC_MAX_RESTARTS": "0"}, 75), ({"TORCHELASTIC_MAX_RESTARTS": "3"}, 0)]
)
def test_torchrun_that_restarts_ranks_does_not_restart_one_that_was_asked_to_stop(environ, code):
    assert stop_code(environ) == code
