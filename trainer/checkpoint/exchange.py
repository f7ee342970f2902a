"""Small JSON messages between all ranks with bounded waits, so that they fail together and none waits forever."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from anyshard.configs.errors import CheckpointError, DiskFullError
from anyshard.trainer.checkpoint.storage import is_disk_full


@dataclass(frozen=True)
class Exchange:
    """All ranks of a gloo group, or one process alone.

    Every method is collective: all ranks must call it; it blocks until they have, at most `timeout_s`.
    """

    group: dist.ProcessGroup | None
    timeout_s: float

    @property
    def rank(self) -> int:
        """Rank of this process among all."""
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's JSON value, by rank.

        Raises:
            CheckpointError: a rank died, or did not come within the time.
        """
        if self.group is None:
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
            work = dist.all_gather(parts, tensor, group=self.group, async_op=True)
            work.wait(datetime.timedelta(seconds=self.timeout_s))
        except RuntimeError as error:
            raise CheckpointError(
                f"A rank died, or did not come to the checkpoint within {self.timeout_s:g} s ({str(error).splitlines()[0]})."
            ) from error
        return parts

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
