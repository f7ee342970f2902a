"""Wishes to stop or to save, and how all ranks agree on them.

A wish comes from a signal to any rank, from the STOP or SAVE file in the run directory, from `stop.at_s`, or from the
end of the job of Slurm. Every rank contributes its wishes to a small all-reduce on the control group and reads the result
at a later micro-step, so that nobody waits for it and everybody acts at the same one. That is the next, or some later one
where micro-steps are so short that agreeing would be felt. The batches of an evaluation count as micro-steps do.
`stop.at_step` needs no agreement.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from anyshard.configs import schema
from anyshard.trainer.allocation import Allocation
from anyshard.trainer.signals import Signals

logger = logging.getLogger(__name__)

AGREE_EVERY_S = 0.1
"""Time between two agreements where micro-steps are shorter: far below what anybody who asks for a stop notices."""


@dataclass(frozen=True)
class Decision:
    """What all ranks agreed to do now that a step is done."""

    save: bool = False
    stop: str | None = None  # the reason


GO_ON = Decision()
NO_WISHES = (0, 0, 0, 0)
_JOB_ENDS = 2  # what is wished by the time: 1 is `stop.at_s`


@dataclass
class StopControl:
    """Collects this rank's wishes and agrees on them with the others.

    Args:
        run_dir: where STOP and SAVE are looked for, by rank 0 alone.
        group: control group of all ranks, None when alone.
        started_s: `time.monotonic()` when the rank started, for `stop.at_s`.
        allocation: of Slurm; looked at by rank 0 alone.

    Attributes:
        reason: why the ranks stop, once they have agreed to.
        needed_s: time that the present step and a save will take, as far as is known; the end of the job is that far away.
    """

    options: schema.Stop
    run_dir: Path
    signals: Signals
    group: dist.ProcessGroup | None
    rank: int
    started_s: float = field(default_factory=time.monotonic)
    allocation: Allocation | None = None
    reason: str | None = None
    needed_s: float = 0.0
    _save_wished: bool = False
    _flags: torch.Tensor = field(default_factory=lambda: torch.zeros(5, dtype=torch.int32))
    _work: dist.Work | None = None
    _polls_to_go: int = 1  # until the next agreement
    _interval: int = 1  # polls between the last agreement and the next one
    _begun_s: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        # texts, since a Path would be made and turned into one at every micro-step
        self._stop_file, self._save_file = str(self.run_dir / "STOP"), str(self.run_dir / "SAVE")

    def poll(self) -> str | None:
        """A micro-step is done, or a batch of an evaluation: the reason to stop now, if the ranks have agreed on one.

        Collective: every rank calls it equally often; it waits only for an all-reduce begun at an earlier call.
        """
        if self.reason is None:
            signum, stop_file, save_file, late = self._agreed()
            self._save_wished = self._save_wished or bool(save_file)
            if signum:
                self.reason = f"signal {signal.Signals(signum).name}"
            elif stop_file:
                self.reason = f"file {self._stop_file}"
            elif late:
                self.reason = "the time limit of the job" if late == _JOB_ENDS else f"stop.at_s={self.options.at_s:g}"
        return self.reason

    def new_pace(self) -> None:
        """What comes now takes another time than what was before: agree at the next poll. Every rank calls it."""
        self._polls_to_go, self._interval, self._begun_s = 1, 1, time.monotonic()

    def decide(self, step: int) -> Decision:
        """What to do now that `step` is done, its last micro-step included. Collective: as `poll`, which it calls."""
        self.poll()
        if self.options.at_step is not None and step >= self.options.at_step:
            self.reason = f"stop.at_step={self.options.at_step}"
        if self.reason is not None:
            return Decision(stop=self.reason)
        save, self._save_wished = self._save_wished, False
        return Decision(save=save) if save else GO_ON

    def done(self) -> None:
        """The run has stopped with its state saved: a STOP file would only end the next start as well."""
        if self.rank == 0:
            Path(self._stop_file).unlink(missing_ok=True)

    def _wishes(self) -> tuple[int, int, int, int]:
        first = self.rank == 0
        late = int(self.options.at_s is not None and time.monotonic() - self.started_s >= self.options.at_s)
        if first and self.allocation is not None and self.allocation.is_over(self.needed_s):
            late = _JOB_ENDS
        return (
            self.signals.received or 0,
            int(first and os.path.exists(self._stop_file)),
            int(first and self._take_save_file()),
            late if first else 0,
        )

    def _take_save_file(self) -> bool:
        if not os.path.exists(self._save_file):
            return False
        Path(self._save_file).unlink(missing_ok=True)
        return True

    def _agreed(self) -> tuple[int, ...]:
        if self.group is None:
            return self._wishes()
        self._polls_to_go -= 1
        if self._polls_to_go:
            return NO_WISHES
        agreed: tuple[int, ...] = NO_WISHES
        flags = torch.tensor((*self._wishes(), self._polls_wished()), dtype=torch.int32)
        if self._work is not None:
            self._work.wait()
            *wishes, self._interval = self._flags.tolist()
            agreed = tuple(wishes)
        self._polls_to_go, self._flags = self._interval, flags
        self._work = dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.group, async_op=True)
        return agreed

    def _polls_wished(self) -> int:
        """Polls until the next agreement as this rank would have it; the ranks take the most that one of them wishes."""
        now = time.monotonic()
        poll_s, self._begun_s = (now - self._begun_s) / self._interval, now
        return max(1, int(AGREE_EVERY_S / max(poll_s, 1e-3)))

    def drain(self) -> None:
        """Wait for the last all-reduce. Collective: every rank calls it once, at the end of the loop."""
        if self._work is not None:
            self._work.wait()
            self._work = None
