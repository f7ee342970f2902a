"""`fit`: one rank's life from a configuration to the end of training. The library's entry and that of `run.py`.

Order matters: join the others, agree on one configuration, then data, model, engine, restore, loop. Whatever fails
before the loop leaves the run directory as it was found, but for logs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from anyshard.configs import frozen, rules, schema, world
from anyshard.configs.errors import AnyshardError, ConfigError, Problem
from anyshard.configs.registry import lookup
from anyshard.configs.relayout import relayout
from anyshard.configs.run_lock import LAUNCHER_VARIABLE, START_LOCK, only_run
from anyshard.configs.writing import write_file
from anyshard.offload.measured import load
from anyshard.offload.op_cache import needed_ops, op_env, remove_stale_locks, status
from anyshard.offload.ops import build
from anyshard.offload.swap_space import SwapSpace
from anyshard.parallel import comm
from anyshard.parallel.groups import Groups, create_groups
from anyshard.parallel.rank_env import RankEnv, discover, host_name
from anyshard.parallel.topology import draw, mesh_of, shorten
from anyshard.trainer import lm
from anyshard.trainer.allocation import find_allocation
from anyshard.trainer.batch import BatchPlan, plan_batch
from anyshard.trainer.building import fitted, model_builder, require_whole_sequences
from anyshard.trainer.callbacks.base import Callbacks
from anyshard.trainer.checkpoint import ram
from anyshard.trainer.checkpoint.manager import TIMEOUT_S, CheckpointManager
from anyshard.trainer.checkpoint.retention import Retention
from anyshard.trainer.data.build import build_data
from anyshard.trainer.data.loader import Loader
from anyshard.trainer.data.order import SampleOrder
from anyshard.trainer.data.tokenizers import save_tokenizer, vocab_size
from anyshard.trainer.ds_config import compile_ds_config
from anyshard.trainer.engine import Engine, build_engine, require_dtype
from anyshard.trainer.metrics import Reporter
from anyshard.trainer.models.describe import describe_model
from anyshard.trainer.models.hf import hf_config
from anyshard.trainer.node_check import OnLost, check_nodes, listen_to_nodes
from anyshard.trainer.peak import device_peak_flops
from anyshard.trainer.planning import counted_flops_per_token, planned_flops_per_token, start_planning
from anyshard.trainer.restore import describe_layout, is_in_memory, layout_of, restore
from anyshard.trainer.saves import GRACE_S, Saves
from anyshard.trainer.signals import Signals
from anyshard.trainer.state import Progress, seed_everything
from anyshard.trainer.stop import StopControl
from anyshard.trainer.swapping import Swapping, claim_space
from anyshard.trainer.task import Task
from anyshard.trainer.tracking import build_trackers
from anyshard.trainer.trainer import Outcome, Trainer

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Rank:
    """This rank and how it talks to the others."""

    env: RankEnv
    device: torch.device
    control: dist.ProcessGroup | None
    checkpoints: dist.ProcessGroup | None
    started_s: float


def fit(
    config: schema.Config | Callable[[], schema.Config], task: Task | None = None, *, signals: Signals | None = None
) -> Outcome:
    """Train `config` on the ranks that the environment describes (any launcher's, or this process alone), resuming as asked.

    Collective: every rank calls it. The configuration of rank 0 is used on all of them.

    Args:
        config: from `compose`, or a function that makes it (called on rank 0 only).
        task: what to train; None builds the causal language model of `config.model` and `config.data`.
        signals: handlers installed already; None installs them.

    Raises:
        ConfigError, DataError, EnvError: something is wrong and nothing was changed.
        EnvError: also where another run is alive in the run directory.
        CheckpointError: no checkpoint could be restored, or the last one not written.
        TrainError: the loss is not finite, or a callback failed.
    """
    if signals is not None:
        return fit_as_process(config, task, signals=signals)
    signals = Signals()
    signals.install()
    try:
        return fit_as_process(config, task, signals=signals)
    finally:
        signals.uninstall()


def fit_as_process(
    config: schema.Config | Callable[[], schema.Config],
    task: Task | None = None,
    *,
    signals: Signals,
    overrides: Sequence[str] = (),
    timeout_s: float | None = None,
    on_agreed: Callable[[Path], None] | None = None,
    on_lost: OnLost = lambda error, host: logger.error("%s", error),
) -> Outcome:
    """`fit` for a process that is nothing but this rank.

    Args:
        overrides: what made `config`, for overrides.yaml.
        timeout_s: `launch.timeout_s`, where `config` is not known before the ranks have met.
        on_agreed: called with the run directory once it is known and locked, before anything long begins; None for the library.
        on_lost: called when a host does not answer any more.

    Raises:
        AnyshardError: as `fit`.
    """
    started_s = time.monotonic()
    rank = _join(config, started_s, timeout_s)
    with contextlib.ExitStack() as held:
        agreed = _agree(config, rank, held, overrides)
        if on_agreed is not None:
            on_agreed(frozen.run_dir_of(agreed))
        _build_ops(needed_ops(agreed, rank.device.type), rank.env)
        space = held.enter_context(claim_space(agreed, frozen.run_dir_of(agreed), rank.env))
        return _fit(agreed, task, rank, signals, on_lost, space, as_process=on_agreed is not None)


def _join(config: schema.Config | Callable[[], schema.Config], started_s: float, timeout_s: float | None) -> Rank:
    """Meet the other ranks. Collective."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.update(op_env())
    env = discover(os.environ)
    if env.local_rank == 0:
        remove_stale_locks()
    device = comm.device_of(env)
    if device.type == "cpu":
        _build_ops(["shm_comm"], env, optional=True)
    if timeout_s is None:
        timeout_s = config.launch.timeout_s if isinstance(config, schema.Config) else schema.Launch().timeout_s
    if not dist.is_initialized():
        comm.init_distributed(env, device, timeout_s=timeout_s)
    control = comm.control_group(env, timeout_s=timeout_s)
    return Rank(env, device, control, comm.control_group(env, timeout_s=TIMEOUT_S), started_s)


def _build_ops(names: Sequence[str], env: RankEnv, *, optional: bool = False) -> None:
    """Build the operators that are missing, on one rank of each node and before the first use of them, which is silent.

    Args:
        optional: leave those out that cannot be built here.

    Raises:
        EnvError: one cannot be built.
    """
    wanted = [entry for entry in status(names) if entry.state != "built" and not (optional and entry.state == "missing")]
    if wanted and env.local_rank == 0:
        build([entry.op.name for entry in wanted], say=lambda line: print(line, flush=True))


def _agree(
    config: schema.Config | Callable[[], schema.Config], rank: Rank, held: contextlib.ExitStack, overrides: Sequence[str]
) -> schema.Config:
    """Rank 0's configuration, checked and frozen, on every rank; its error on every rank too. Collective.

    Args:
        held: keeps the lock of the run directory.
    """
    result: list[Any] = [None]
    if rank.env.rank == 0:
        try:
            result[0] = _freeze(config() if callable(config) else config, rank, held, overrides)
        except AnyshardError as error:
            result[0] = error
    if rank.control is not None:
        dist.broadcast_object_list(result, src=0, group=rank.control)
    if isinstance(result[0], AnyshardError):
        raise result[0]
    agreed: schema.Config = result[0]
    return agreed


def _freeze(config: schema.Config, rank: Rank, held: contextlib.ExitStack, overrides: Sequence[str]) -> schema.Config:
    """Resolve what depends on the ranks that are here, check, and write the run directory unless it is frozen."""
    nodes, procs = rank.env.world_size // rank.env.local_world_size, rank.env.local_world_size
    config, notes = relayout(world.adopt_ranks(config, nodes=nodes, procs_per_node=procs))
    for note in notes:
        print(note, flush=True)
    rules.require(config)
    if config.offload.auto:
        reason = "ranks that are started by hand do not choose: that takes the planner."
        fix = "Set offload=none, cpu, cpu_param, nvme or nvme_param ('anyshard plan offload=auto' says which is fastest)."
        raise ConfigError(Problem("offload.auto", True, reason, fix))
    run_dir = frozen.run_dir_of(config)
    launched = LAUNCHER_VARIABLE in os.environ
    with contextlib.nullcontext() if launched else only_run(run_dir, START_LOCK):
        frozen.check_run_dir(config, run_dir)
        batch = plan_batch(config.train, mesh_of(config).dp)
        held.enter_context(only_run(run_dir))
        frozen.freeze(config, overrides, run_dir)
        write_file(run_dir / "ds_config.json", json.dumps(compile_ds_config(config, batch), indent=2) + "\n")
        if not launched:
            write_file(run_dir / "env.json", json.dumps(frozen.environment(), indent=2) + "\n")
    return config


def _fit(
    config: schema.Config,
    task: Task | None,
    rank: Rank,
    signals: Signals,
    on_lost: OnLost,
    space: SwapSpace | None,
    *,
    as_process: bool,
) -> Outcome:
    run_dir = frozen.run_dir_of(config)
    groups = create_groups(mesh_of(config), rank.env.rank)
    batch = plan_batch(config.train, groups.mesh.dp)
    ds_config = compile_ds_config(config, batch)
    swapping = Swapping(config, ds_config, space, groups, load(space.folder).aio) if space is not None else None
    callbacks = Callbacks.build(config.callbacks)  # a wrong option is told before anything long begins
    first = rank.env.rank == 0
    trackers = build_trackers(config, run_dir, rank=rank.env.rank)
    with Reporter(run_dir, rank=rank.env.rank, max_steps=config.train.max_steps, trackers=trackers) as reporter:
        hosts = _hosts(rank)
        reporter.event("start", world_size=rank.env.world_size, zero=config.zero.stage, pid=os.getpid(), hosts=hosts)
        what = f"{config.model.name} on {config.data.name}" if task is None else "a model and data of your own"
        reporter.say("\n".join([_banner(config, what, batch, rank), *_drawn_mesh(groups, rank, hosts)]))
        check_nodes(config, rank.env, rank.device, reporter)
        require_dtype(config.precision.dtype)
        seed_everything(config.seed, "model")
        data_fingerprint = None
        if task is None:
            if config.model.builder == "hf":  # before the corpus is tokenised, which may take hours
                model_vocab_size = hf_config(config.model, config.data).get_text_config().vocab_size
                lm.check_vocabulary(model_vocab_size, vocab_size(config.data), config.data.tokenizer)
            # a process that called `fit` itself may have registered what the planner's process does not know
            planning = start_planning(run_dir) if first and as_process else None
            splits = build_data(config.data, seed=config.seed, say=reporter.say if first else _silent)
            builder = model_builder(config, ds_config, rank.device, groups, reporter.say if first else _silent, swapping)
            task = lm.build_lm_task(config, splits, builder, groups)
            if first:
                planned = planned_flops_per_token(run_dir, planning) if as_process else counted_flops_per_token(config)
                task.flops_per_token = planned
            data_fingerprint = splits.fingerprint
            if first:
                save_tokenizer(splits.tokenizer, run_dir / "tokenizer")
        else:
            require_whole_sequences(config)
            task = fitted(task, ds_config, config, groups, swapping)
        engine = build_engine(config, ds_config, task.model, device=rank.device, groups=groups, swapping=swapping)
        if swapping is not None:
            _tell_swapping(swapping, reporter)
        with listen_to_nodes(config, rank.env, rank.control, hosts, reporter, on_lost):
            return _train(config, task, engine, batch, callbacks, rank, signals, reporter, data_fingerprint)


def _tell_swapping(swapping: Swapping, reporter: Reporter) -> None:
    """What this rank has on its drive; it may be nothing, and then the person should know."""
    where = swapping.describe()
    reporter.event("offload", **where)
    if not where["nvme_bytes"]:
        reporter.say("  note: no part of the state is as large as 1 MiB: all of it stays in memory, as with offload=cpu")
    else:
        reporter.say(f"offload: {where['nvme_bytes'] / 2**30:.2f} GiB of each rank's state in {Path(where['folder']).parent}")


def _train(
    config: schema.Config,
    task: Task,
    engine: Engine,
    batch: BatchPlan,
    callbacks: Callbacks,
    rank: Rank,
    signals: Signals,
    reporter: Reporter,
    data_fingerprint: str | None,
) -> Outcome:
    run_dir = frozen.run_dir_of(config)
    progress = Progress()
    manager = CheckpointManager(
        frozen.checkpoint_dir_of(config),
        stay=Retention(
            config.checkpoint.keep,
            config.checkpoint.keep_every,
            config.checkpoint.best_metric,
            best_is_highest=config.checkpoint.best_is is schema.Best.highest,
        ),
        verify=config.checkpoint.verify,
        group=rank.checkpoints,
        event=reporter.event,
        staging_bytes=None if config.checkpoint.staging_gib is None else int(config.checkpoint.staging_gib * 2**30),
        bandwidth_mib_s=config.checkpoint.bandwidth_mib_s,
    )
    memory = _memory_of(config, rank, reporter) if config.checkpoint.ram_every_steps else None
    # the ranks that share their tokens drop the same activations
    seed_everything(config.seed, "train", *engine.groups.stream)
    restored = restore(
        config,
        manager,
        memory,
        engine,
        progress,
        callbacks,
        world_size=rank.env.world_size,
        reporter=reporter,
        data_fingerprint=data_fingerprint,
    )

    model = describe_model(engine.ds.module)

    def meta(progress: Progress, callback_state: dict[str, Any]) -> dict[str, Any]:
        return {
            **progress.to_meta(),
            "layout": layout_of(config, rank.env.world_size),
            "data_fingerprint": data_fingerprint,
            "global_batch_size": batch.global_batch_size,
            "optimizer": dataclasses.asdict(config.optimizer),
            "callbacks": callback_state,
            "model": model,
        }

    def warn(text: str) -> None:
        reporter.say(f"WARNING: {text}")
        if rank.env.rank:
            logger.warning("%s", text)

    background = config.checkpoint.mode is schema.Mode["async"]
    # what is in memory only is not durable: the run's last save is not left out because of it
    last = None if restored is None or is_in_memory(restored, memory) else (restored, progress.step)
    saves = Saves(manager, engine.ds, background=background, meta=meta, warn=warn, restored=last, memory=memory)
    order = SampleOrder(len(task.train_data), config.seed, config.data.shuffle)
    dp_rank = engine.groups.dp_rank
    loader = Loader(task.train_data, collate=task.collate, order=order, batch=batch, dp_rank=dp_rank, device=rank.device)
    allocation = find_allocation(os.environ, config.stop.margin_s) if rank.env.rank == 0 else None
    stops = StopControl(config.stop, run_dir, signals, rank.control, rank.env.rank, rank.started_s, allocation)
    peak = device_peak_flops(config, rank.device)
    trainer = Trainer(
        config,
        task,
        engine,
        loader=loader,
        batch=batch,
        progress=progress,
        schedule=lookup("schedule", config.schedule.name, key="schedule.name")(config.schedule, config.train.max_steps),
        stops=stops,
        reporter=reporter,
        callbacks=callbacks,
        saves=saves,
        device=rank.device,
        rank=rank.env.rank,
        run_dir=run_dir,
        peak_flops=peak * rank.env.world_size if peak else None,
    )
    signals.training = True
    with contextlib.closing(loader):
        try:
            outcome = trainer.run()
        finally:
            saves.drain(GRACE_S)
            signals.over = True
    if memory is not None:
        memory.discard()
    return outcome


def _memory_of(config: schema.Config, rank: Rank, reporter: Reporter) -> CheckpointManager:
    """The run's checkpoints in shared memory. Collective.

    Raises:
        EnvError: the folder cannot be made.
    """
    folder = ram.folder_of(frozen.run_dir_of(config))
    ram.make(folder)

    def event(kind: str, **details: Any) -> None:
        if kind in ("save_failed", "checkpoint_damaged"):
            reporter.event(f"ram_{kind}", **details)

    return CheckpointManager(
        folder,
        stay=Retention(1),
        verify=config.checkpoint.verify,
        group=comm.control_group(rank.env, timeout_s=TIMEOUT_S),
        event=event,
        staging_bytes=ram.STAGING_BYTES,
    )


def _banner(config: schema.Config, what: str, batch: BatchPlan, rank: Rank) -> str:
    layout = describe_layout(layout_of(config, rank.env.world_size))
    name = torch.cuda.get_device_name(rank.device) if rank.device.type == "cuda" else "CPU"
    return "\n".join(
        [
            f"{config.run.name}: {what}, {layout}, {config.precision.dtype.value}, {rank.env.world_size} x {name}",
            f"batch: {batch}",
            f"run directory: {frozen.run_dir_of(config)}",
        ]
    )


def _hosts(rank: Rank) -> list[str]:
    """The host of each node, in the order of the ranks. Collective: it blocks."""
    if rank.env.world_size == rank.env.local_world_size:
        return [host_name(os.environ)]
    hosts: list[str] = [""] * rank.env.world_size
    dist.all_gather_object(hosts, host_name(os.environ), group=rank.control)
    return hosts[:: rank.env.local_world_size]


def _drawn_mesh(groups: Groups, rank: Rank, hosts: Sequence[str]) -> list[str]:
    """Which rank is where, on which host; nothing for data parallelism alone."""
    if groups.mesh.dp == groups.mesh.world_size:
        return []
    by_rank = [host for host in hosts for _ in range(rank.env.local_world_size)]
    return [f"  {line}" for line in shorten(draw(groups.mesh, by_rank))]


def _silent(text: str) -> None:
    """Say nothing: rank 0 speaks for all."""
