"""One process alone; several ranks are in tests/dist/test_checkpoint_failures.py."""

import pytest

from anyshard.configs.errors import CheckpointError, DiskFullError
from anyshard.trainer.checkpoint.exchange import Exchange

ALONE = Exchange(None, 1.0)


def test_alone() -> None:
    assert (ALONE.rank, ALONE.world_size) == (0, 1)
    assert ALONE.gather({"a": 1}) == [{"a": 1}]
    assert ALONE.everywhere(lambda: 3) == [3]
    assert ALONE.on_first(lambda: "x") == "x"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (CheckpointError("damaged"), "^damaged$"),
        (OSError(28, "No space left on device", "/x"), "^/x: No space left on device$"),
        (OSError(5, "Input/output error"), "^writing: Input/output error$"),
        (KeyError("lr"), "^KeyError: 'lr'$"),
    ],
)
def test_any_failure_is_a_checkpoint_error(error: Exception, said: str) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(CheckpointError, match=said) as caught:
        ALONE.everywhere(fail)
    assert isinstance(caught.value, DiskFullError) == ("No space" in said)
