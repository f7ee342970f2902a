"""Small JSON messages between all ranks with bounded waits, so that they fail together and none waits forever."""

from __future__ import annotations

import contextlib
import datetime
import json
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from anyshard.configs.errors import CheckpointError, DiskFullError
from anyshard.trainer.checkpoint.storage import is_disk_full

LOOK_S = 5.0
"""How often a rank that waits looks whether another has given up."""


class _TooLateError(RuntimeError):
    """A rank did not come within the time."""


class Exchange:
    """All ranks of a gloo group, or one process alone.

    Every method is collective: all ranks must call it; it blocks until they have, at most `timeout_s`.

    A rank that came too late once is heard again: what it left of the connection would mix up the messages of later saves, so
    whoever gives up says so in the store of the process group, and the next `meet` makes a new connection.

    Attributes:
        rank: of this process among all.
        world_size: number of ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.rank = 0 if group is None else dist.get_rank(group)
        self.world_size = 1 if group is None else dist.get_world_size(group)
        self._connection: Any = group
        self._made_at = 0  # number of the meeting that made the connection
        self._meetings = 0
        self._store: Any = None
        if group is not None:
            store = distributed_c10d._get_default_store()
            self._store = distributed_c10d.PrefixStore(f"anyshard-checkpoint-{group.group_name}", store)

    def meet(self) -> None:
        """Before messages that belong together: make a new connection if some rank gave the present one up.

        Raises:
            CheckpointError: not all ranks came to make it.
        """
        self._meetings += 1
        if not self._is_given_up():
            return
        within = datetime.timedelta(seconds=self.timeout_s)
        try:
            store = distributed_c10d.PrefixStore(f"connection-{self._meetings}", self._store)
            self._connection = dist.ProcessGroupGloo(store, self.rank, self.world_size, within)
        except RuntimeError as error:
            raise self._absent(error) from error
        self._made_at = self._meetings

    def _is_given_up(self) -> bool:
        with contextlib.suppress(RuntimeError):  # the process that holds the store is gone: so will be the others
            return self._store is not None and self._store.add(f"given-up-{self._made_at}", 0) > 0
        return False

    def _absent(self, error: Exception) -> CheckpointError:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return CheckpointError(f"A rank died, or did not come to the checkpoint within {self.timeout_s:g} s ({reason}).")

    def gather(self, value: Any) -> list[Any]:
        """Every rank's JSON value, by rank.

        Raises:
            CheckpointError: a rank died, or did not come within the time.
        """
        if self._connection is None:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [int(length) for length in self._all_gather(torch.tensor([data.numel()]))]
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: data.numel()] = data
        parts = self._all_gather(padded)
        return [json.loads(bytes(part[:length].numpy())) for part, length in zip(parts, lengths, strict=True)]

    def _all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        try:
            self._wait(self._connection.allgather([parts], [tensor]))
            if self._is_given_up():
                raise _TooLateError("another rank has given up")
        except _TooLateError as error:
            with contextlib.suppress(RuntimeError):
                self._store.add(f"given-up-{self._made_at}", 1)
            raise self._absent(error) from error
        except RuntimeError as error:  # a rank died: nobody waits for it again
            raise self._absent(error) from error
        return parts

    def _wait(self, work: Any) -> None:
        """Wait for the others; a rank that comes when they have given up need not wait as long again."""
        ends_s = time.monotonic() + self.timeout_s
        while not work.is_completed():
            left_s = ends_s - time.monotonic()
            with contextlib.suppress(RuntimeError):
                work.wait(datetime.timedelta(seconds=max(0.001, min(LOOK_S, left_s))))
            if not work.is_completed() and (left_s <= LOOK_S or self._is_given_up()):
                raise _TooLateError("timed out" if left_s <= LOOK_S else "another rank has given up")
        work.wait()

    def everywhere(self, action: Callable[[], Any]) -> list[Any]:
        """Run `action` on every rank; returns the JSON value of each.

        Raises:
            CheckpointError: it failed on any rank; the same on every rank, whatever the cause was.
            DiskFullError: the disk of any rank is full.
        """
        value, error, full, cause = None, None, False, None
        try:
            value = action()
        except Exception as caught:  # whatever it is, the other ranks must hear of it or they would wait
            error, full, cause = _describe(caught), is_disk_full(caught), caught
        answers = self.gather([value, error, full])
        failed = {rank: reason for rank, (_, reason, _) in enumerate(answers) if reason is not None}
        if failed:
            reasons = list(dict.fromkeys(failed.values()))
            ranks = f"rank {', '.join(map(str, failed))}: " if self.world_size > 1 and len(failed) < self.world_size else ""
            kind = DiskFullError if any(full for _, _, full in answers) else CheckpointError
            raise kind(ranks + "; ".join(reasons)) from cause
        return [value for value, _, _ in answers]

    def on_first(self, action: Callable[[], Any]) -> Any:
        """Run `action` on rank 0 and give its JSON value to every rank. Raises as `everywhere` does."""
        return self.everywhere(action if self.rank == 0 else _nothing)[0]


def _nothing() -> None:
    """What ranks other than 0 do."""


def _describe(error: Exception) -> str:
    if isinstance(error, CheckpointError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename or 'writing'}: {error.strerror}"
    return f"{type(error).__name__}: {error}"
