"""Saving, finding and restoring checkpoints of a live DeepSpeed engine: the protocol, and what ranks must agree on.

A save: rank 0 makes a temporary directory -> every rank writes and syncs its data file and manifest -> all agree that it
worked -> rank 0 checks the sizes, writes COMMIT, syncs, renames, syncs the parent -> all hear of it -> retention. A failure
at any point is the same CheckpointError on every rank, and nothing of the save is left.
"""

from __future__ import annotations

import datetime
import logging
import platform
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from anyshard.configs.errors import CheckpointError, DiskFullError
from anyshard.trainer.checkpoint import catalog, layout, optimizers, retention
from anyshard.trainer.checkpoint.exchange import Exchange
from anyshard.trainer.checkpoint.manifest import COMMIT, Commit, FileRef, Manifest, Scalar, Tensor, data_name, dump_commit
from anyshard.trainer.checkpoint.reader import ChunkIndex, check_same_model, read_into
from anyshard.trainer.checkpoint.storage import replace_durably, sync_directory, write_durably
from anyshard.trainer.checkpoint.writer import file_bytes, fragments_to_write, write_rank

logger = logging.getLogger(__name__)

LATEST = "latest"
"""Advisory file with the name of the newest checkpoint, for people and scripts; nothing here reads it."""


@dataclass(frozen=True)
class SaveResult:
    """A committed checkpoint.

    Attributes:
        num_bytes: in the data files of all ranks.
        stall_s: time that training stood still.
    """

    path: Path
    num_bytes: int
    stall_s: float


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
        keep: newest committed checkpoints that stay; 0 keeps all.
        verify: check every byte that is read on restore against its checksum.
        group: gloo process group of all ranks, apart from the training collectives; None for a single process.
        event: called on rank 0 as `event(kind, **details)`: save_begin, commit, save_failed, checkpoint_damaged.
        timeout_s: how long the slowest rank may take for its part of a save or a restore.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int,
        verify: bool,
        group: dist.ProcessGroup | None,
        event: Callable[..., None],
        timeout_s: float = 1800.0,
    ) -> None:
        self.directory = Path(directory)
        self._keep = keep
        self._verify = verify
        self._ranks = Exchange(group, timeout_s)
        self._event = event if self._ranks.rank == 0 else _no_event

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
        started = time.perf_counter()
        self._event("save_begin", step=step)
        try:
            path, num_bytes = self._save(engine, step, meta, rank_meta)
        except CheckpointError as error:
            self._event("save_failed", step=step, error=str(error))
            raise
        stall_s = time.perf_counter() - started
        self._event("commit", step=step, path=str(path), num_bytes=num_bytes, seconds=round(stall_s, 3))
        return SaveResult(path, num_bytes, stall_s)

    def _save(self, engine: Any, step: int, meta: dict[str, Any], rank_meta: dict[str, Any]) -> tuple[Path, int]:
        ranks = self._ranks
        final = self.directory / catalog.checkpoint_name(step)
        temporary: Path | None = None
        try:
            temporary = Path(ranks.on_first(lambda: str(retention.make_temporary(self.directory, final.name))))
            written = ranks.everywhere(lambda: asdict(self._write(engine, temporary, rank_meta)))
            ranks.on_first(lambda: self._commit(engine, step, meta, temporary, final, written))
        except CheckpointError as error:
            if ranks.rank == 0 and temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)
            text = str(error).rstrip(".").replace(str(temporary), str(final))
            if isinstance(error, DiskFullError):
                text += ". Free some space on this disk, lower checkpoint.keep, or set checkpoint.dir to a folder on another"
            raise type(error)(f"step {step} was not saved: {text}.") from error
        return final, sum(part["data_bytes"] for part in written)

    def _write(self, engine: Any, temporary: Path, rank_meta: dict[str, Any]) -> Any:
        optimizer, slots = layout.inner_optimizer(engine), layout.slots(engine)
        held = optimizers.fragments(slots, optimizer)
        if self._ranks.rank == 0:
            held += layout.buffer_fragments(engine.module)
        mine = fragments_to_write(held, self._ranks.rank, self._ranks.world_size)
        names = {fragment.tensor.name for fragment in mine}
        scalars = optimizers.scalars([slot for slot in slots if slot.name in names], optimizer)
        return write_rank(temporary, self._ranks.rank, mine, scalars, rank_meta)

    def _commit(
        self, engine: Any, step: int, meta: dict[str, Any], temporary: Path, final: Path, written: list[dict[str, Any]]
    ) -> None:
        """Rank 0: make the checkpoint exist, then drop the ones that it makes superfluous."""
        refs = [FileRef(**part["manifest"]) for part in written]
        for rank, (ref, part) in enumerate(zip(refs, written, strict=True)):
            for name, size in ((data_name(rank), part["data_bytes"]), (ref.file, ref.nbytes)):
                if file_bytes(temporary / name) != size:
                    raise CheckpointError(
                        f"{temporary / name} has {file_bytes(temporary / name)} bytes, rank {rank} wrote {size}."
                    )
        write_durably(temporary / COMMIT, dump_commit(_commit_record(engine, step, meta, refs)))
        sync_directory(temporary)
        retention.publish(temporary, final)
        try:
            (final / retention.LEASE).unlink()
            replace_durably(self.directory / LATEST, f"{final.name}\n".encode())
            retention.retain(self.directory, self._keep)
            retention.collect(self.directory)
        except OSError as error:  # the checkpoint exists: nothing here may undo that
            logger.warning("after the save of %s: %s", final.name, error)

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
            path = Path(self._ranks.on_first(lambda: str(catalog.resolve(Path(resume)))))
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

    def _candidates(self) -> list[str]:
        retention.collect(self.directory)
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
        ranks, path = self._ranks, Path(path)
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
        targets, notes = optimizers.create_states(
            layout.slots(engine), optimizer, found.tensors(), found.scalars(), steps=int(record["optimizer_steps"])
        )
        targets += layout.buffer_fragments(engine.module)
        notes += _dtype_notes(targets, found)
        read_into(found.path, targets, found.chunks, verify=self._verify)
        optimizers.set_hyper_parameters(optimizer, found.commit.optimizer["groups"])
        engine.global_steps = int(record["global_steps"])
        engine.skipped_steps = int(record["skipped_steps"])
        engine.global_samples = engine.global_steps * engine.train_batch_size()
        engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
        return notes + _restore_scaler(engine, record["loss_scaler"])

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


def _dtype_notes(targets: Iterable[layout.Fragment], found: _Stored) -> list[str]:
    changed: dict[tuple[str, str, str], int] = {}
    for target in targets:
        stored = found.chunks[target.tensor.name, target.tensor.key][0].tensor.dtype
        if stored != target.tensor.dtype:
            kind = (target.tensor.key, stored, target.tensor.dtype)
            changed[kind] = changed.get(kind, 0) + 1
    return [f"{count} tensors [{key}] stored as {old} are {new} here" for (key, old, new), count in changed.items()]


def _commit_record(engine: Any, step: int, meta: dict[str, Any], refs: list[FileRef]) -> Commit:
    import deepspeed

    import anyshard

    optimizer = layout.inner_optimizer(engine)
    return Commit(
        step=step,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        layout={**layout.describe(engine), "world_size": len(refs)},
        versions={
            "anyshard": anyshard.__version__,
            "torch": torch.__version__,
            "deepspeed": deepspeed.__version__,
            "python": platform.python_version(),
        },
        engine={
            "global_steps": engine.global_steps,
            "skipped_steps": engine.skipped_steps,
            "optimizer_steps": engine.global_steps - engine.skipped_steps,
            "loss_scaler": _scaler_state(engine),
        },
        optimizer={
            "class": type(optimizer).__name__,
            "kind": optimizers.habits_of(optimizer).kind,
            "groups": optimizers.hyper_parameters(optimizer),
        },
        tied=layout.tied_names(engine.module),
        meta=meta,
        manifests=refs,
    )


_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def _scaler_state(engine: Any) -> dict[str, float] | None:
    """What fp16's dynamic loss scaling has learnt; None without it."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return {key: getattr(scaler, key) for key in _SCALER_FIELDS} if getattr(scaler, "dynamic", False) else None


def _restore_scaler(engine: Any, stored: dict[str, float] | None) -> list[str]:
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    dynamic = getattr(scaler, "dynamic", False)
    if stored and dynamic:
        for key in _SCALER_FIELDS:
            setattr(scaler, key, stored[key])
    if stored and not dynamic:
        return [f"the loss scale {stored['cur_scale']:g} of the checkpoint is not used: this run does not scale losses"]
    return ["the checkpoint has no loss scale: it starts from its initial value"] if dynamic and not stored else []
