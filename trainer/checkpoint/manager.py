"""Saving, finding and restoring checkpoints of a live DeepSpeed engine: what ranks must agree on.

How a save goes is in `saving.py` (threads), `snapshot.py` (copying), `writer.py` (files) and `protocol.py` (commit).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from anyshard.configs.errors import CheckpointError
from anyshard.configs.places import place
from anyshard.trainer.checkpoint import catalog, layout, optimizers, ram, retention, swapped
from anyshard.trainer.checkpoint.capture import restore_scaler
from anyshard.trainer.checkpoint.exchange import Exchange
from anyshard.trainer.checkpoint.faults import faults_of_environment
from anyshard.trainer.checkpoint.manifest import Commit, Manifest, Scalar, Tensor
from anyshard.trainer.checkpoint.reader import ChunkIndex, check_same_model, read_into
from anyshard.trainer.checkpoint.saving import PendingSave, Saver, SaveResult
from anyshard.trainer.checkpoint.store import store_of

logger = logging.getLogger(__name__)

MIB = 2**20
TIMEOUT_S = 1800.0
"""How long the slowest rank may take for its part of a save or a restore."""


@dataclass(frozen=True)
class Restored:
    """What came with a restored state.

    Attributes:
        meta: as given to `save`.
        rank_meta: of this rank; None when another number of ranks wrote the checkpoint.
        notes: what is not exactly as it was, in words.
    """

    meta: dict[str, Any]
    rank_meta: dict[str, Any] | None
    notes: list[str]


@dataclass(frozen=True)
class _Stored:
    """A checkpoint as read from its COMMIT and manifests."""

    path: Path
    commit: Commit
    manifests: list[Manifest]
    chunks: ChunkIndex

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        by_name: dict[str, dict[str, Tensor]] = {}
        for (name, key), chunks in self.chunks.items():
            by_name.setdefault(name, {})[key] = chunks[0].tensor
        return by_name

    def scalars(self) -> dict[str, dict[str, Scalar]]:
        by_name: dict[str, dict[str, Scalar]] = {}
        for manifest in self.manifests:
            for scalar in manifest.scalars:
                for name in scalar.names:
                    by_name.setdefault(name, {})[scalar.key] = scalar
        return by_name


class CheckpointManager:
    """The checkpoints of one directory.

    Args:
        stay: which checkpoints stay.
        verify: check every byte that is read on restore against its checksum.
        group: gloo process group of all ranks that nothing else uses; None for a single process.
        event: called on rank 0 as `event(kind, **details)`, from any thread: save_begin, snapshot, persisted, commit,
            save_failed, checkpoint_damaged.
        staging_bytes: bound on the host memory of this rank's snapshots; None takes what fits.
        bandwidth_mib_s: bound on the rate at which this rank writes; None for none.
        timeout_s: how long the slowest rank may take for its part of a save or a restore.
    """

    def __init__(
        self,
        directory: Path,
        *,
        stay: retention.Retention,
        verify: bool,
        group: dist.ProcessGroup | None,
        event: Callable[..., None],
        staging_bytes: int | None = None,
        bandwidth_mib_s: float | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self.directory = place(directory)
        self._store = store_of(self.directory)
        self._verify = verify
        self._ranks = Exchange(group, timeout_s)
        self._event = event if self._ranks.rank == 0 else _no_event
        self._saver = Saver(
            self.directory,
            stay=stay,
            ranks=self._ranks,
            event=self._event,
            staging_bytes=staging_bytes,
            bytes_per_s=None if bandwidth_mib_s is None else bandwidth_mib_s * MIB,
            faults=faults_of_environment(self._ranks.rank),
        )

    def save(self, engine: Any, *, step: int, meta: dict[str, Any], rank_meta: dict[str, Any]) -> SaveResult:
        """Write and commit the state of `engine`.

        Collective: every rank calls it between two steps; it blocks until the checkpoint is committed or has failed.

        Args:
            engine: a live `deepspeed.DeepSpeedEngine`, ZeRO 0 to 3.
            meta: JSON of the whole run; rank 0's is stored.
            rank_meta: JSON of this rank.

        Raises:
            CheckpointError: it failed, on any rank; the same on all. No trace of it is left, earlier ones are intact.
            DiskFullError: that was why.
        """
        return self._saver.begin(engine, step=step, meta=meta, rank_meta=rank_meta, small=True).result()

    def begin(
        self, engine: Any, *, step: int, meta: dict[str, Any], rank_meta: dict[str, Any], small: bool = False
    ) -> PendingSave:
        """Begin a save of the present state of `engine` and return: training may go on at once.

        The next step of the optimizer waits for what it changes and is not copied yet. Whoever else changes the state (weights
        averaged in a callback, say) calls `wait_until_copied` first.

        Collective: every rank calls it between two steps; it does not wait for the others. It waits for this rank's disk
        where two earlier saves are unfinished. `drain` must be called before the process ends.

        Args:
            small: the caller waits for it anyway, so a few blocks of host memory are enough.
        """
        return self._saver.begin(engine, step=step, meta=meta, rank_meta=rank_meta, small=small)

    def prepare(self, engine: Any) -> None:
        """Make the host memory that `begin` will need in the background, any time after the first step."""
        self._saver.prepare(engine)

    def wait_until_copied(self) -> None:
        """Wait until no save needs the live state any more."""
        self._saver.guard.wait()

    def take_guard_stall_s(self) -> float:
        """How long optimizer steps have waited for copies since the last call."""
        stall_s, self._saver.guard.stall_s = self._saver.guard.stall_s, 0.0
        return stall_s

    def drain(self, timeout_s: float | None = None) -> None:
        """Wait until every save that was begun is committed or has failed (its `PendingSave` knows which), or for so long."""
        self._saver.drain(timeout_s)

    def agree(self, holds: bool) -> bool:
        """Whether something holds on every rank.

        Collective: every rank calls it, with no save on its way; it blocks.

        Raises:
            CheckpointError: a rank died, or did not come within the time.
        """
        self._ranks.meet()
        return all(self._ranks.gather(holds))

    def find(self, resume: str) -> Path | None:
        """The checkpoint to resume from.

        Collective: every rank calls it with the same value; it blocks. The ranks share the work of verifying.

        Args:
            resume: "never"; "auto": the newest that verifies, None when there are none at all; "must": the newest; or a
                path to a checkpoint or to a run.

        Raises:
            CheckpointError: what is wanted is damaged or does not exist; or, under "auto", all there are are damaged.
        """
        if resume == "never":
            return None
        if resume not in ("auto", "must"):
            path = place(self._ranks.on_first(lambda: str(catalog.resolve(place(resume)))))
            self._refuse_damaged(path)
            return path
        names: list[str] = self._ranks.on_first(self._candidates)
        if not names and resume == "must":
            raise CheckpointError(f"resume=must: there is no checkpoint in {self.directory}. Use resume=auto to start anew.")
        for name in names:
            path = self.directory / name
            if resume == "must":
                self._refuse_damaged(path)
                return path
            damages = self._damages(path)
            if not damages:
                return path
            self._event("checkpoint_damaged", path=str(path), damages=damages)
            if self._ranks.rank == 0:
                logger.warning("the checkpoint %s is damaged and is passed over: %s", path, _first(damages))
        if names:
            raise CheckpointError(
                f"None of the {len(names)} checkpoints in {self.directory} is sound; the newest: {_first(damages)}. "
                "Use resume=never to start anew, or restore the files."
            )
        return None

    def newest_step(self) -> int:
        """The highest step of a checkpoint by name, sound or not; -1 where there is none. Collective: it blocks."""
        step: int = self._ranks.on_first(lambda: ram.newest_step(self.directory))
        return step

    def discard(self) -> None:
        """Remove the whole folder, which must be one of shared memory. Collective: it blocks."""
        self._ranks.on_first(lambda: ram.discard(self.directory))

    def set_aside(self, after_step: int) -> list[str]:
        """Rename the checkpoints of later steps than the one that a run goes back to; returns the new names.

        Collective: every rank calls it; it blocks.

        Raises:
            CheckpointError: one cannot be renamed.
        """
        names: list[str] = self._ranks.on_first(lambda: self._store.set_aside(after_step))
        return names

    def _candidates(self) -> list[str]:
        self._store.collect()
        return [found.path.name for found in catalog.list_checkpoints(self.directory)]

    def _refuse_damaged(self, path: Path) -> None:
        damages = self._damages(path)
        if damages:
            self._event("checkpoint_damaged", path=str(path), damages=damages)
            raise CheckpointError(
                f"The checkpoint {path} is damaged: {_first(damages)}. resume=auto takes the newest sound one."
            )

    def _damages(self, path: Path) -> list[str]:
        rank, world_size = self._ranks.rank, self._ranks.world_size

        def check() -> list[str]:
            return [str(damage) for damage in catalog.verify(path, rank=rank, world_size=world_size, data=self._verify)]

        return list(dict.fromkeys(damage for part in self._ranks.everywhere(check) for damage in part))

    def restore(self, engine: Any, path: Path) -> Restored:
        """Put the state of a checkpoint into `engine`, whatever layout either has.

        Collective: every rank calls it before the first step; it blocks. Each rank reads what it needs only; the gathering of
        16-bit parameters runs on DeepSpeed's own data-parallel group.

        Raises:
            CheckpointError: the checkpoint is of another model or optimizer, or damaged; the same on every rank. Anything but
                a failure while data is read leaves the engine as it was.
        """
        ranks, path = self._ranks, place(path)
        optimizer = layout.inner_optimizer(engine)
        stored: list[_Stored] = []
        ranks.everywhere(lambda: stored.append(_load(path)))
        (found,) = stored
        ranks.everywhere(lambda: _check(engine, optimizer, found))
        layout.release_gathered(engine)
        notes: list[str] = []
        ranks.everywhere(lambda: notes.extend(self._fill(engine, optimizer, found)))
        layout.refresh(engine)
        self._confirm(optimizer, found)
        per_rank = found.manifests[ranks.rank].meta if found.commit.world_size == ranks.world_size else None
        return Restored(found.commit.meta, per_rank, notes)

    def _fill(self, engine: Any, optimizer: torch.optim.Optimizer, found: _Stored) -> list[str]:
        """Write the stored state into this rank's tensors, groups and counters; returns notes."""
        record = found.commit.engine
        notes: list[str] = []
        tensors: list[Tensor] = []
        more = layout.buffer_fragments(engine.module)
        position = layout.position(engine)
        stored, scalars, steps = found.tensors(), found.scalars(), int(record["optimizer_steps"])
        for slots in swapped.in_turn(engine, layout.slots(engine)):
            targets, said = optimizers.create_states(slots, optimizer, stored, scalars, steps=steps, position=position)
            targets, more = targets + more, []
            read_into(found.path, targets, found.chunks, verify=self._verify)
            notes += said
            tensors += [target.tensor for target in targets]
        notes += _dtype_notes(tensors, found)
        optimizers.replay_bias_correction(optimizer)
        optimizers.set_hyper_parameters(optimizer, found.commit.optimizer["groups"])
        engine.global_steps = int(record["global_steps"])
        engine.skipped_steps = int(record["skipped_steps"])
        engine.global_samples = engine.global_steps * engine.train_batch_size()
        engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
        return notes + restore_scaler(engine, record["loss_scaler"])

    def _confirm(self, optimizer: torch.optim.Optimizer, found: _Stored) -> None:
        """Every rank now has the hyper-parameters and the optimizer step of COMMIT.

        Raises:
            CheckpointError: one has not.
        """
        groups = found.commit.optimizer["groups"]
        steps = {scalar.value for by_key in found.scalars().values() for key, scalar in by_key.items() if key == "step"}

        def check() -> None:
            for name, settings in optimizers.hyper_parameters(optimizer).items():
                for key, value in settings.items():
                    if key in groups.get(name, {}) and groups[name][key] != value:
                        raise CheckpointError(
                            f"after the restore {key} of group {name} is {value}, COMMIT says {groups[name][key]}"
                        )
            for state in optimizer.state.values():
                if steps and "step" in state and float(state["step"]) not in steps:
                    raise CheckpointError(
                        f"after the restore the optimizer is at step {float(state['step']):g}, COMMIT says {steps}"
                    )

        self._ranks.everywhere(check)


def _no_event(kind: str, **details: Any) -> None:
    """Ranks other than 0 report nothing."""


def _first(damages: list[str]) -> str:
    more = f" (and {len(damages) - 1} more)" if len(damages) > 1 else ""
    return damages[0] + more


def _load(path: Path) -> _Stored:
    commit = catalog.read_commit(path)
    manifests = catalog.read_manifests(path, commit)
    return _Stored(path, commit, manifests, catalog.index_chunks(manifests))


def _check(engine: Any, optimizer: torch.optim.Optimizer, found: _Stored) -> None:
    check_same_model(layout.global_tensors(engine.module), found.chunks)
    optimizers.check_kind(optimizer, found.commit.optimizer)
    optimizers.check_groups(optimizer, found.commit.optimizer["groups"])
    layout.slots(engine)  # refuses an engine whose state cannot be reached


def _dtype_notes(tensors: Iterable[Tensor], found: _Stored) -> list[str]:
    changed: dict[tuple[str, str, str], int] = {}
    for tensor in tensors:
        stored = found.chunks[tensor.name, tensor.key][0].tensor.dtype
        if stored != tensor.dtype:
            kind = (tensor.key, stored, tensor.dtype)
            changed[kind] = changed.get(kind, 0) + 1
    return [f"{count} tensors [{key}] stored as {old} are {new} here" for (key, old, new), count in changed.items()]
