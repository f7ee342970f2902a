"""The loop's side of checkpoints: when a save is begun, what has become of earlier ones, and that the last one is durable."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from anyshard.configs.errors import CheckpointError
from anyshard.trainer.checkpoint.manager import CheckpointManager
from anyshard.trainer.checkpoint.ram import discard
from anyshard.trainer.checkpoint.saving import PendingSave
from anyshard.trainer.state import Progress, rng_state

logger = logging.getLogger(__name__)

GRACE_S = 120.0
"""How long a rank that fails waits for a save on its way: other ranks may be gone or hang, so it cannot wait for ever."""


class Saves:
    """Saves of one run.

    Args:
        ds: the `deepspeed.DeepSpeedEngine`.
        background: training goes on while a checkpoint is copied, written and committed.
        meta: what a checkpoint stores beside the state, of the progress and the callbacks' states.
        warn: tells people of a save that failed.
        restored: the checkpoint that the run continues from, and its step.
        memory: saves to shared memory; None for none.

    Attributes:
        last_good: the newest checkpoint that is known to be committed.
        num_failed: saves that failed.
        last_save_s: how long the last one took from its begin to its commit.
    """

    def __init__(
        self,
        manager: CheckpointManager,
        ds: Any,
        *,
        background: bool,
        meta: Callable[[Progress, dict[str, Any]], dict[str, Any]],
        warn: Callable[[str], None],
        restored: tuple[Path, int] | None,
        memory: CheckpointManager | None = None,
    ) -> None:
        self._memory, self._in_memory, self._last_in_memory = memory, list[PendingSave](), -1
        self._manager, self._ds, self._background, self._meta, self._warn = manager, ds, background, meta, warn
        self.last_good: Path | None = None
        self._last_step: int | None = None
        if restored is not None:
            self.last_good, self._last_step = restored
        self.num_failed = 0
        self.last_save_s = 0.0
        self._pending: list[PendingSave] = []
        self._last_failed = False
        self._stall_s = 0.0
        self._prepared = False

    def begin(self, progress: Progress, callback_state: dict[str, Any]) -> None:
        """Save the present state. Collective: every rank calls it at the same step; a failure is told, training goes on."""
        started = time.perf_counter()
        self._last_step = progress.step
        meta, rank_meta = self._meta(progress, callback_state), {"rng": rng_state()}
        save = self._manager.begin(self._ds, step=progress.step, meta=meta, rank_meta=rank_meta, small=not self._background)
        self._pending.append(save)
        if not self._background:
            save.join()
            self.poll()
        self._stall_s += time.perf_counter() - started

    def begin_in_memory(self, progress: Progress, callback_state: dict[str, Any]) -> None:
        """Save the present state to shared memory. Collective: every rank calls it at the same step; a failure is told."""
        assert self._memory is not None
        started, self._last_in_memory = time.perf_counter(), progress.step
        meta, rank_meta = self._meta(progress, callback_state), {"rng": rng_state()}
        self._in_memory.append(self._memory.begin(self._ds, step=progress.step, meta=meta, rank_meta=rank_meta))
        self._stall_s += time.perf_counter() - started

    def forget_memory(self) -> None:
        """Nobody shall continue from what is in shared memory. Call `drain` before."""
        if self._memory is not None:
            discard(self._memory.directory)

    def finish(self, progress: Progress, callback_state: dict[str, Any], *, memory_first: bool = False) -> None:
        """Make the present state durable, unless it is. Collective: every rank calls it; it blocks.

        Args:
            memory_first: put it into shared memory before, where that is used: who is killed meanwhile loses nothing.

        Raises:
            CheckpointError: it could not be written, on any rank.
        """
        started = time.perf_counter()
        if memory_first and self._memory is not None and self._last_in_memory != progress.step != self._last_step:
            self.begin_in_memory(progress, callback_state)
            self._memory.drain()
        self.drain()
        if self._last_step != progress.step or not self._manager.agree(not self._last_failed):
            meta, rank_meta = self._meta(progress, callback_state), {"rng": rng_state()}
            self.last_good = self._manager.save(self._ds, step=progress.step, meta=meta, rank_meta=rank_meta).path
            self._last_step, self._last_failed = progress.step, False
        self._stall_s += time.perf_counter() - started

    def after_step(self, *, will_save: bool) -> None:
        """Report saves that have ended meanwhile; after the first step, make the memory that saves will need."""
        if self._pending or self._in_memory:
            self.poll()
        if not self._prepared:
            self._prepared = True
            if will_save and self._background:
                self._manager.prepare(self._ds)

    def poll(self) -> None:
        """Report saves that have ended."""
        while self._pending and self._pending[0].is_finished:
            save = self._pending.pop(0)
            try:
                self.last_good = save.result().path
                self._last_failed, self.last_save_s = False, save.took_s
            except CheckpointError as error:
                self.num_failed += 1
                self._last_failed = True
                self._warn(f"{error} Training goes on.")
        while self._in_memory and self._in_memory[0].is_finished:
            try:
                self._in_memory.pop(0).result()
            except CheckpointError as error:
                self._warn(f"in shared memory: {error} Training goes on.")

    def drain(self, timeout_s: float | None = None) -> None:
        """Wait until no save is on its way, and report them."""
        ends_s = None if timeout_s is None else time.monotonic() + timeout_s
        self._manager.drain(timeout_s)
        if self._memory is not None:
            self._memory.drain(None if ends_s is None else max(0.0, ends_s - time.monotonic()))
        self.poll()

    def take_stall_s(self) -> tuple[float, float]:
        """Time that training stood still since the last call: between steps, and inside them."""
        in_steps_s = sum(manager.take_guard_stall_s() for manager in (self._manager, self._memory) if manager is not None)
        taken = self._stall_s, in_steps_s
        self._stall_s = 0.0
        return taken
