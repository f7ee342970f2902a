"""Wishes to stop or to save, and how all ranks agree on them.

A wish comes from a signal to any rank, from the STOP or SAVE file in the run directory, from `stop.at_s`, or from the
end of the job of Slurm. Every rank contributes its wishes to a small all-reduce on the control group and reads the result
at a later step, so that nobody waits for it and everybody acts at the same step. That is each step, or every few where
steps are so short that agreeing would be felt. `stop.at_step` needs no agreement.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from anyshard.configs import schema
from anyshard.trainer.allocation import Allocation

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)

AGREE_EVERY_S = 0.1
"""Time between two agreements where steps are shorter: far below what anybody who asks for a stop notices."""


class Interrupted(BaseException):
    """A signal arrived before training began: nothing to save, leave at once (not an Exception: nobody may swallow it)."""

    def __init__(self, signum: int) -> None:
        self.signum = signum
        super().__init__(f"{signal.Signals(signum).name} before the first step")


@dataclass
class Signals:
    """Signal handlers of this rank: before training a signal ends the process, while training it is a wish to stop."""

    training: bool = False
    received: int | None = None

    def install(self) -> None:
        """Handle TERM, INT, USR1, USR2 and HUP from now on; under nohup HUP stays ignored. Main thread only."""
        for signum in SIGNALS:
            if signum is not signal.SIGHUP or signal.getsignal(signum) is not signal.SIG_IGN:
                signal.signal(signum, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received is None:  # the first is the reason: others may follow while the ranks save and end
            self.received = signum
        if not self.training:
            raise Interrupted(signum)


@dataclass(frozen=True)
class Decision:
    """What all ranks agreed to do after the present step."""

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
    """

    options: schema.Stop
    run_dir: Path
    signals: Signals
    group: dist.ProcessGroup | None
    rank: int
    started_s: float = field(default_factory=time.monotonic)
    allocation: Allocation | None = None
    _flags: torch.Tensor = field(default_factory=lambda: torch.zeros(5, dtype=torch.int32))
    _work: dist.Work | None = None
    _steps_to_go: int = 1  # until the next agreement
    _interval: int = 1  # steps between the last agreement and the next one
    _begun_s: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        # texts, since a Path would be made and turned into one at every step
        self._stop_file, self._save_file = str(self.run_dir / "STOP"), str(self.run_dir / "SAVE")

    def decide(self, step: int) -> Decision:
        """What to do now that `step` is done.

        Collective: every rank calls it once a step; it waits only for an all-reduce begun at an earlier step.
        """
        agreed = self._agreed()
        if self.options.at_step is not None and step >= self.options.at_step:
            return Decision(stop=f"stop.at_step={self.options.at_step}")
        if agreed == NO_WISHES:
            return GO_ON
        signum, stop_file, save_file, late = agreed
        if signum:
            return Decision(stop=f"signal {signal.Signals(signum).name}")
        if stop_file:
            return Decision(stop=f"file {self._stop_file}")
        if late == _JOB_ENDS:
            return Decision(stop="the time limit of the job")
        if late:
            return Decision(stop=f"stop.at_s={self.options.at_s:g}")
        return Decision(save=bool(save_file))

    def done(self) -> None:
        """The run has stopped with its state saved: a STOP file would only end the next start as well."""
        if self.rank == 0:
            Path(self._stop_file).unlink(missing_ok=True)

    def _wishes(self) -> tuple[int, int, int, int]:
        first = self.rank == 0
        late = int(self.options.at_s is not None and time.monotonic() - self.started_s >= self.options.at_s)
        if first and self.allocation is not None and self.allocation.is_over():
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
        self._steps_to_go -= 1
        if self._steps_to_go:
            return NO_WISHES
        agreed: tuple[int, ...] = NO_WISHES
        flags = torch.tensor((*self._wishes(), self._steps_wished()), dtype=torch.int32)
        if self._work is not None:
            self._work.wait()
            *wishes, self._interval = self._flags.tolist()
            agreed = tuple(wishes)
        self._steps_to_go, self._flags = self._interval, flags
        self._work = dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.group, async_op=True)
        return agreed

    def _steps_wished(self) -> int:
        """Steps until the next agreement as this rank would have it; the ranks take the most that one of them wishes."""
        now = time.monotonic()
        step_s, self._begun_s = (now - self._begun_s) / self._interval, now
        return max(1, int(AGREE_EVERY_S / max(step_s, 1e-3)))

    def drain(self) -> None:
        """Wait for the last all-reduce. Collective: every rank calls it once, at the end of the loop."""
        if self._work is not None:
            self._work.wait()
            self._work = None
