"""From overrides to running ranks: compose, check, plan, freeze, start."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from anyshard.configs import frozen, rules, schema
from anyshard.configs.compose import compose, compose_with_sources, finalize
from anyshard.configs.compose import sweep as sweep_jobs
from anyshard.configs.errors import EXIT_DONE, EXIT_REQUEUE
from anyshard.configs.registry import lookup
from anyshard.configs.resume import override_frozen
from anyshard.configs.run_lock import START_LOCK, check_free, only_run
from anyshard.configs.world import resolve_world
from anyshard.configs.writing import write_file
from anyshard.launch.env import find_hardware
from anyshard.launch.inputs import check_inputs
from anyshard.launch.plan import Plan, plan
from anyshard.launch.runs import read_events
from anyshard.launch.slurm import check_not_submitted
from anyshard.launch.spec import build_spec
from anyshard.offload.op_cache import remove_stale_locks
from anyshard.trainer.checkpoint import ram
from anyshard.trainer.checkpoint.catalog import list_checkpoints


def train(overrides: Sequence[str], *, config_dir: Path | None, dry_run: bool) -> int:
    """`anyshard train`; returns the exit code.

    Raises:
        ConfigError: with every problem that was found; nothing was written.
    """
    composition = compose_with_sources(overrides, config_dir=config_dir)
    config = finalize(composition.config, datetime.now())
    return start(config, overrides, dry_run=dry_run, sources=lambda: composition.sources)


def start(
    config: schema.Config, overrides: Sequence[str], *, dry_run: bool, force: bool = False, sources: rules.Sources = dict
) -> int:
    """Check, plan, freeze and start a composed configuration.

    Args:
        force: accept a run directory that holds other mathematics.
        sources: what set each key, to name the file to blame.
    """
    config = resolve_world(config, find_hardware().num_gpus)
    rules.require(config, sources)
    run_dir = frozen.run_dir_of(config)
    check_not_submitted(run_dir)
    check_free(run_dir)
    frozen.check_run_dir(config, run_dir, force=force)
    if config.launch.name == "local":
        check_inputs(config)
    planned = plan(config)
    backend = lookup("launch", config.launch.name, key="launch.name")()
    spec = build_spec(config, run_dir, find_hardware())
    backend.check(spec)
    if dry_run:
        planned.show()
        print(backend.render(spec).text())
        return EXIT_DONE
    if not planned.fits:
        print("WARNING: by the plan this does not fit the memory here; 'anyshard plan' has the numbers", file=sys.stderr)
    for lock in remove_stale_locks():
        print(f"removed {lock}, left by a build that was killed: ranks would wait for it for ever", file=sys.stderr)
    with only_run(run_dir, START_LOCK, wait_s=0):
        check_not_submitted(run_dir)
        check_free(run_dir)
        frozen.check_run_dir(config, run_dir, force=force)  # again: another start may have been faster
        freeze(config, overrides, planned, run_dir)
        sys.stdout.flush()
        code = int(backend.submit(spec))
        if config.checkpoint.ram_every_steps:
            _drain_memory(config, run_dir, code)
    if code != EXIT_DONE:
        print(_how_to_go_on(config, run_dir, code), file=sys.stderr)
    return code


def _drain_memory(config: schema.Config, run_dir: Path, code: int) -> None:
    """The ranks are gone: what only shared memory has goes to the disk, unless the run came to its end."""
    folder = ram.folder_of(run_dir)
    if code != EXIT_DONE:
        try:
            saved = ram.drain(folder, frozen.checkpoint_dir_of(config))
        except OSError as error:
            print(
                f"the state of step {ram.newest_step(folder)} stays in {folder}: it cannot be written to the disk "
                f"({error.strerror}). Started again on this host, before a reboot, the run continues from there.",
                file=sys.stderr,
            )
            return
        if saved is not None:
            print(f"the newest state was in memory, and is now in {saved}", file=sys.stderr)
    ram.discard(folder)


def _how_to_go_on(config: schema.Config, run_dir: Path, code: int) -> str:
    """What is left after an early end: the last good checkpoint, and the command that goes on from it."""
    damaged = {event["path"] for event in read_events(run_dir) if event["event"] == "checkpoint_damaged"}
    found = list_checkpoints(frozen.checkpoint_dir_of(config))
    sound = [each.path for each in found if each.problem is None and str(each.path) not in damaged]
    command = f"anyshard resume {run_dir}" + ("" if config.resume == "auto" else " resume=auto")
    if sound:
        return f"The last good checkpoint is {sound[0]}. Go on with: {command}"
    if code != EXIT_REQUEUE and not frozen.has_progress(run_dir, config):
        return f"Nothing was trained. Put it right and start again; run.dir={run_dir} can be used again."
    return f"There is no checkpoint yet. Start again with: {command}"


def sweep(overrides: Sequence[str], *, config_dir: Path | None, dry_run: bool) -> int:
    """`anyshard train -m`: one whole launch after the other; returns the first exit code that is not 0.

    All configurations are composed and checked before the first run starts.

    Raises:
        ConfigError: one of them is wrong.
    """
    folder = Path("multirun") / f"{datetime.now():%Y%m%d-%H%M%S}"
    jobs = [
        [f"run.dir={folder / str(number)}", *job] for number, job in enumerate(sweep_jobs(overrides, config_dir=config_dir))
    ]
    configs = [resolve_world(compose(job, config_dir=config_dir), find_hardware().num_gpus) for job in jobs]
    for config in configs:
        rules.require(config)
    worst = EXIT_DONE
    for number, (job, config) in enumerate(zip(jobs, configs, strict=True)):
        print(f"run {number + 1} of {len(jobs)}: {' '.join(job[1:])}", flush=True)
        code = start(config, job, dry_run=dry_run)
        worst = worst or code
        if code == EXIT_REQUEUE and not _meant_to_stop(config) and number + 1 < len(jobs):
            print(f"stopped: the other {len(jobs) - number - 1} runs of the sweep are not started", file=sys.stderr)
            return code
    return worst


def _meant_to_stop(config: schema.Config) -> bool:
    """Whether an early stop is what its configuration says, and not what somebody wished meanwhile."""
    return config.stop.at_step is not None or config.stop.at_s is not None


def freeze(config: schema.Config, overrides: Sequence[str], planned: Plan, run_dir: Path) -> None:
    """Write what the ranks read and what people look up later."""
    frozen.freeze(config, overrides, run_dir)
    write_file(run_dir / "ds_config.json", json.dumps(planned.ds_config, indent=2) + "\n")
    write_file(run_dir / "plan.json", json.dumps(planned.to_dict(), indent=2) + "\n")
    write_file(run_dir / "env.json", json.dumps(frozen.environment(), indent=2) + "\n")


def resume(run_dir: Path, overrides: Sequence[str], *, config_dir: Path | None, force: bool, dry_run: bool) -> int:
    """`anyshard resume`: the frozen configuration with other lengths, intervals or layout; returns the exit code.

    Raises:
        ConfigError: an override would change the mathematics of the run and `force` is off.
    """
    config = override_frozen(run_dir, overrides, force=force, config_dir=config_dir)
    if not dry_run:
        check_free(run_dir)  # a live run's STOP is its own
        (run_dir / "STOP").unlink(missing_ok=True)
    return start(config, overrides, dry_run=dry_run, force=force)
