"""Dying on purpose at a chosen point of a save: how recovery is tested, in our tests and on a cluster before it is trusted.

`ANYSHARD_FAULT=point:rank` kills that rank (SIGKILL) when a save reaches the point; `point:rank:n` the n-th time. Points in
the order of a save:

    begin       the training thread has asked for the save
    temporary   rank 0 has made the temporary directory
    data        a block of the data file is written
    persisted   data and manifest of this rank are on the disk
    gathered    all ranks have heard that all are
    committed   COMMIT is on the disk, the directory still has its temporary name (rank 0)
    renamed     the checkpoint exists, older ones are not removed yet (rank 0)
"""

from __future__ import annotations

import os
import signal

from anyshard.configs.errors import CheckpointError

VARIABLE = "ANYSHARD_FAULT"
POINTS = ("begin", "temporary", "data", "persisted", "gathered", "committed", "renamed")


class Faults:
    """The fault that this process shall die of, if any.

    Args:
        text: as in the environment variable; empty for none.

    Raises:
        CheckpointError: the text names no point and rank.
    """

    def __init__(self, text: str, rank: int) -> None:
        self._point, self._times_left = "", 0
        if not text:
            return
        point, *numbers = text.split(":")
        if point not in POINTS or not 1 <= len(numbers) <= 2 or not all(number.isdecimal() for number in numbers):
            raise CheckpointError(f"{VARIABLE}={text}: it is POINT:RANK or POINT:RANK:TIMES. Points: {', '.join(POINTS)}.")
        if int(numbers[0]) == rank:
            self._point, self._times_left = point, int(numbers[1]) if len(numbers) == 2 else 1

    def reach(self, point: str) -> None:
        """Die here, if that is what was asked for."""
        if point == self._point:
            self._times_left -= 1
            if self._times_left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def faults_of_environment(rank: int) -> Faults:
    """What `ANYSHARD_FAULT` says."""
    return Faults(os.environ.get(VARIABLE, ""), rank)
