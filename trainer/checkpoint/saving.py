"""Saves of a live engine, in the background: capture -> copy -> persist -> commit.

`begin` is all that the training thread does: it takes small values at once (scalars, hyper-parameters, buffers, what the
trainer stores) and starts two threads. One copies the state to the host (`snapshot.py`); the other writes it and goes through
the protocol with the other ranks (`protocol.py`), over a group of their own with bounded waits.

Saves are written one after the other. At most one more waits meanwhile, its state copied as far as there is room, and what
comes then waits to begin. So the ranks, which begin the same saves in the same order, always write the same one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyshard.configs.errors import CheckpointError
from anyshard.trainer.checkpoint import layout
from anyshard.trainer.checkpoint.capture import Captured, capture
from anyshard.trainer.checkpoint.exchange import Exchange
from anyshard.trainer.checkpoint.faults import Faults
from anyshard.trainer.checkpoint.manifest import Commit
from anyshard.trainer.checkpoint.protocol import Protocol
from anyshard.trainer.checkpoint.retention import Retention
from anyshard.trainer.checkpoint.snapshot import FilePlan, Snapshot, UpdateGuard
from anyshard.trainer.checkpoint.staging import BLOCK_BYTES, MIN_BLOCKS, StagingPool, blocks_for, free_host_bytes, max_blocks
from anyshard.trainer.checkpoint.store import store_of
from anyshard.trainer.checkpoint.throttle import Throttle
from anyshard.trainer.checkpoint.views import Views
from anyshard.trainer.checkpoint.writer import CHUNK_BYTES, Written, write_blocks

logger = logging.getLogger(__name__)

MAX_UNFINISHED = 2
"""One save is being written, one more may wait; the next one has to."""
NICENESS = 5
"""Priority of the thread that hashes and writes, below that of the threads that train."""


@dataclass(frozen=True)
class SaveResult:
    """A committed checkpoint.

    Attributes:
        num_bytes: in the data files of all ranks.
        stall_s: time that the training of this rank stood still for it.
    """

    path: Path
    num_bytes: int
    stall_s: float


class PendingSave:
    """A save on its way, or what became of it."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.began_s = time.perf_counter()
        self.begin_stall_s = 0.0
        self.snapshot: Snapshot | None = None
        self.captured: Captured | None = None
        self.refused: Exception | None = None  # what went wrong while it was captured
        self.took_s = 0.0  # once it is finished
        self._outcome: tuple[Path, int] | CheckpointError | None = None
        self._finished = threading.Event()

    @property
    def stall_s(self) -> float:
        """Time that training stood still for it so far."""
        return self.begin_stall_s + (self.snapshot.waited_s if self.snapshot is not None else 0.0)

    @property
    def age_s(self) -> float:
        """Time since it was asked for."""
        return round(time.perf_counter() - self.began_s, 3)

    @property
    def is_finished(self) -> bool:
        """Committed or failed."""
        return self._finished.is_set()

    def join(self, timeout_s: float | None = None) -> None:
        """Wait until it is committed or has failed, or for so long."""
        self._finished.wait(timeout_s)

    def result(self) -> SaveResult:
        """Wait until it is committed.

        Raises:
            CheckpointError: it failed; the same on every rank.
        """
        self._finished.wait()
        if isinstance(self._outcome, CheckpointError):
            raise self._outcome
        assert self._outcome is not None
        return SaveResult(*self._outcome, self.stall_s)

    def finish(self, outcome: tuple[Path, int] | CheckpointError) -> None:
        """Tell those who wait, and let go of the state."""
        self.begin_stall_s, self.snapshot, self.captured = self.stall_s, None, None
        self._outcome, self.took_s = outcome, self.age_s
        self._finished.set()


class Saver:
    """Saves to one directory. Its methods are called by the training thread, at the same steps on every rank.

    Args:
        stay: which checkpoints stay.
        event: called on rank 0, from any thread: save_begin, snapshot, persisted, commit, save_failed.
        staging_bytes: bound on the host memory of this rank's snapshots; None takes what fits.
        bytes_per_s: bound on the rate of this rank's writing; None for none.

    Attributes:
        guard: knows how long optimizer steps have waited.
    """

    def __init__(
        self,
        directory: Path,
        *,
        stay: Retention,
        ranks: Exchange,
        event: Callable[..., None],
        staging_bytes: int | None,
        bytes_per_s: float | None,
        faults: Faults,
    ) -> None:
        self.guard = UpdateGuard()
        self._store = store_of(directory)
        self._protocol = Protocol(self._store, stay, ranks, faults)
        self._ranks, self._told, self._faults = ranks, event, faults
        self._staging_bytes = staging_bytes
        self._throttle = Throttle(bytes_per_s)
        self._pool: StagingPool | None = None
        self._views: Views | None = None
        self._unfinished: list[PendingSave] = []
        self._copier: threading.Thread | None = None
        self._writer: threading.Thread | None = None

    def begin(
        self, engine: Any, *, step: int, meta: dict[str, Any], rank_meta: dict[str, Any], small: bool = False
    ) -> PendingSave:
        """Start a save. Waits only while two earlier ones are unfinished.

        Args:
            small: training waits for it anyway, so a few blocks of host memory are enough.
        """
        save = PendingSave(step)
        if small:
            self._throttle.lift()
        else:
            self._throttle.set()
        while len(self._unfinished) >= MAX_UNFINISHED:
            self._unfinished[0].join()
            self._drop_finished()
        self._event("save_begin", step=step)
        self._faults.reach("begin")
        rank, world_size = self._ranks.rank, self._ranks.world_size
        try:
            views = self._views_of(engine)
            save.captured = capture(engine, views, step=step, meta=meta, rank_meta=rank_meta, rank=rank, world_size=world_size)
            pool = self._pool_for(views.plan, small)
            save.snapshot = Snapshot(views.plan.then(save.captured.buffers, CHUNK_BYTES, pool.block_bytes), pool)
            self.guard.protect(save.snapshot, [layout.inner_optimizer(engine)])
        except Exception as error:  # the other ranks must hear of it, or they would wait
            save.refused = error
        self._unfinished.append(save)
        self._start(save)
        save.begin_stall_s = time.perf_counter() - save.began_s
        return save

    def _views_of(self, engine: Any) -> Views:
        if self._views is None or not self._views.are_of(engine):
            rank, world_size = self._ranks.rank, self._ranks.world_size
            self._views = Views.of(engine, rank=rank, world_size=world_size, chunk_bytes=CHUNK_BYTES, block_bytes=BLOCK_BYTES)
        return self._views

    def _pool_for(self, plan: FilePlan, small: bool) -> StagingPool:
        if self._pool is None:
            self._pool = StagingPool(0, block_bytes=BLOCK_BYTES, pinned=plan.device is not None)
        pool, num_blocks = self._pool, _num_blocks(plan)
        if small:
            pool.max_blocks = max(pool.max_blocks, MIN_BLOCKS)
        elif pool.max_blocks < 2 * num_blocks:
            free, num_bytes = free_host_bytes() + pool.num_bytes, num_blocks * BLOCK_BYTES
            pool.max_blocks = max(pool.max_blocks, max_blocks(num_bytes, self._staging_bytes, free_bytes=free))
        return pool

    def prepare(self, engine: Any) -> None:
        """Have a thread make the memory of the first snapshot, so that the first save does not wait for it."""
        with contextlib.suppress(CheckpointError):  # the save will say why it cannot be
            plan = self._views_of(engine).plan
            pool, num_blocks = self._pool_for(plan, False), _num_blocks(plan)
            threading.Thread(target=pool.prepare, args=[num_blocks], name="checkpoint-memory", daemon=True).start()

    def _start(self, save: PendingSave) -> None:
        threads = [
            threading.Thread(target=work, args=[save, previous], name=f"checkpoint-{name}-{save.step}", daemon=True)
            for name, work, previous in (("copy", self._copy, self._copier), ("write", self._write, self._writer))
        ]
        self._copier, self._writer = threads
        for thread in threads:
            thread.start()

    def _copy(self, save: PendingSave, previous: threading.Thread | None) -> None:
        """The copying thread of one save."""
        if previous is not None:
            previous.join()
        snapshot = save.snapshot
        if snapshot is not None:
            num_bytes = snapshot.num_bytes
            snapshot.copy(lambda: self._event("snapshot", step=save.step, num_bytes=num_bytes, seconds=save.age_s))

    def _event(self, kind: str, **details: Any) -> None:
        """Tell of an event; that it cannot be written down (a full disk, say) must end neither a save nor training."""
        try:
            self._told(kind, **details)
        except Exception:
            logger.warning("the event %s could not be recorded", kind, exc_info=True)

    def _write(self, save: PendingSave, previous: threading.Thread | None) -> None:
        """The writing thread of one save. Whatever happens, those who wait for the save are told."""
        if previous is not None:
            previous.join()
        with contextlib.suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)  # on Linux that is of a thread
        outcome: tuple[Path, int] | CheckpointError = CheckpointError(f"step {save.step} was not saved: its thread ended.")
        try:
            outcome = self._outcome(save)
            self._report(save, outcome)
        finally:
            save.finish(outcome)

    def _outcome(self, save: PendingSave) -> tuple[Path, int] | CheckpointError:
        """Go through the protocol; afterwards nothing waits for the state any more."""
        try:
            return self._protocol.save(
                save.step,
                lambda directory: self._write_files(save, directory),
                lambda: _record_of(save),
                lambda num_bytes: self._event("persisted", step=save.step, num_bytes=num_bytes, seconds=save.age_s),
            )
        except CheckpointError as error:
            return error
        except BaseException as error:
            logger.exception("the save of step %d", save.step)
            return CheckpointError(f"step {save.step} was not saved: {type(error).__name__}: {error}.")
        finally:
            if save.snapshot is not None:
                save.snapshot.give_up()

    def _report(self, save: PendingSave, outcome: tuple[Path, int] | CheckpointError) -> None:
        if isinstance(outcome, CheckpointError):
            self._event("save_failed", step=save.step, error=str(outcome))
        else:
            path, num_bytes = outcome
            stall_ms = round(1000 * save.stall_s, 3)
            self._event("commit", step=save.step, path=str(path), num_bytes=num_bytes, seconds=save.age_s, stall_ms=stall_ms)

    def _write_files(self, save: PendingSave, directory: Path) -> Written:
        if save.refused is not None:
            raise save.refused
        assert save.snapshot is not None
        assert save.captured is not None

        def after_block(num_bytes: int) -> None:
            self._faults.reach("data")
            self._throttle.wait(num_bytes)

        with contextlib.closing(save.snapshot.blocks()) as blocks:  # a failed write gives its block back
            return write_blocks(
                directory,
                self._ranks.rank,
                save.snapshot.num_bytes,
                blocks,
                save.captured.scalars,
                save.captured.rank_meta,
                store=self._store,
                after_block=after_block,
            )

    def _drop_finished(self) -> None:
        self._unfinished = [save for save in self._unfinished if not save.is_finished]

    def drain(self, timeout_s: float | None = None) -> None:
        """Wait until every save is committed or has failed, as fast as the disk can, or for so long."""
        ends_s = None if timeout_s is None else time.monotonic() + timeout_s
        self._throttle.lift()
        for save in self._unfinished:
            save.join(None if ends_s is None else max(0.0, ends_s - time.monotonic()))
        self._drop_finished()
        self._throttle.set()


def _num_blocks(plan: FilePlan) -> int:
    """Blocks of a snapshot, with one for buffers; what is in swap files is read into few of them."""
    if not plan.file_bytes:
        return len(plan.blocks) + 1
    return blocks_for(plan.num_bytes - plan.file_bytes) + MIN_BLOCKS


def _record_of(save: PendingSave) -> Commit:
    """COMMIT without the manifests, on rank 0."""
    assert save.captured is not None
    assert save.captured.commit is not None
    return save.captured.commit
