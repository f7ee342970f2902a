"""From overrides to running ranks: compose, check, plan, freeze, start."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from types import FrameType

from anyshard.configs import frozen, rules, schema
from anyshard.configs.compose import compose, compose_with_sources, finalize
from anyshard.configs.compose import sweep as sweep_jobs
from anyshard.configs.errors import EXIT_DONE, EXIT_REQUEUE, PlanError
from anyshard.configs.registry import lookup
from anyshard.configs.relayout import relayout
from anyshard.configs.resume import override_frozen
from anyshard.configs.run_lock import START_LOCK, check_free, only_run
from anyshard.configs.world import resolve_world
from anyshard.configs.writing import write_file
from anyshard.launch import failures, restarts, show
from anyshard.launch.backend_local import signals_of_people
from anyshard.launch.env import find_hardware, memory_limit_bytes
from anyshard.launch.inputs import check_inputs
from anyshard.launch.plan import Plan, advice, plan, settled
from anyshard.launch.runs import read_events
from anyshard.launch.slurm import check_not_submitted, submit_results, submitted_job
from anyshard.launch.spec import Backend, LaunchSpec, build_spec
from anyshard.offload.op_cache import remove_stale_locks
from anyshard.trainer.checkpoint import ram
from anyshard.trainer.checkpoint.catalog import list_checkpoints

LAUNCHER_BYTES = 400 * 2**20
"""This process and torchrun, beside the ranks."""


def train(overrides: Sequence[str], *, config_dir: Path | None, dry_run: bool) -> int:
    """`anyshard train`; returns the exit code.

    Raises:
        ConfigError: with every problem that was found; nothing was written.
    """
    with leaving_on_signals():
        composition = compose_with_sources(overrides, config_dir=config_dir)
        config = finalize(composition.config, datetime.now())
        return start(config, overrides, dry_run=dry_run, sources=lambda: composition.sources)


@contextmanager
def leaving_on_signals() -> Iterator[None]:
    """A signal that asks for a stop before there are any ranks ends the command as it ends ranks before their first step."""

    def leave(signum: int, frame: FrameType | None) -> None:
        print(f"{signal.Signals(signum).name} before anything was started", file=sys.stderr)
        sys.exit(EXIT_REQUEUE)

    before = {number: signal.signal(number, leave) for number in signals_of_people()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
    config = settled(config)
    planned = plan(config)
    backend = lookup("launch", config.launch.name, key="launch.name")()
    spec = build_spec(config, run_dir, find_hardware())
    backend.check(spec)
    if dry_run:
        planned.show()
        print(backend.render(spec).text())
        return EXIT_DONE
    limit, ranks = memory_limit_bytes(), int(config.launch.procs_per_node)
    if limit is not None and not find_hardware().num_gpus and config.launch.name == "local":
        needed = LAUNCHER_BYTES + ranks * planned.memory.process_bytes
        if needed > limit:
            what = f"{ranks} rank(s) need {needed / 2**30:.2f} GiB, and the control group here allows {limit / 2**30:.2f}"
            raise PlanError(f"{what}: the kernel would kill them. {advice(planned)}")
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
        with leaving_on_signals():
            code = _run(backend, spec)
        for number in signals_of_people():  # how it ended is known
            signal.signal(number, signal.SIG_IGN)
        if config.checkpoint.ram_every_steps:
            _drain_memory(config, run_dir, code)
    if code != EXIT_DONE:
        print(_how_to_go_on(config, run_dir, code), file=sys.stderr)
    return code


def _run(backend: Backend, spec: LaunchSpec) -> int:
    """Start the ranks, and again after failures that this may cure; returns the exit code of the last attempt."""
    attempt, begun = 0, len(failures.read(spec.run_dir))
    while True:
        code = int(backend.submit(spec))
        failed = failures.read(spec.run_dir)[begun:]
        if code in (EXIT_DONE, EXIT_REQUEUE) or not failed or not spec.options.max_restarts or spec.torchrun_restarts:
            return code
        verdict = restarts.judge(failed, max_restarts=spec.options.max_restarts, backoff_s=spec.options.backoff_s)
        if verdict.wait_s is None:
            print(f"not started again: {verdict.why}", file=sys.stderr)
            return code
        print(f"{verdict.why}, in {verdict.wait_s:g} s", file=sys.stderr, flush=True)
        if not restarts.wait(verdict.wait_s, signals_of_people(), partial(restarts.stop_wished, spec.run_dir)):
            print("not started again, as asked", file=sys.stderr)
            return EXIT_REQUEUE
        attempt += 1
        spec = replace(spec, env={**spec.env, restarts.VARIABLE: str(attempt)})


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
    if not dry_run:
        _results(folder.absolute(), configs)
    return worst


def _results(folder: Path, configs: Sequence[schema.Config]) -> None:
    """The table at the end of a sweep: printed, or by a job of Slurm that waits for the others."""
    runs = [frozen.run_dir_of(config) for config in configs]
    jobs = [job for run in runs if (job := submitted_job(run)) is not None]
    if not jobs:
        show.print_results(runs)
        return
    options = configs[0].launch.slurm
    chosen = {"account": options.account, "partition": options.partition, "qos": options.qos}
    directives = [f"--{name}={value}" for name, value in chosen.items() if value]
    if submit_results(folder, jobs, options.python or sys.executable, directives) is not None:
        print(f"when all of them have ended their results are in {folder / 'results.txt'}")
    print(f"at any time: anyshard runs compare {folder}/*/")


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
    with leaving_on_signals():
        return _resume(run_dir, overrides, config_dir=config_dir, force=force, dry_run=dry_run)


def _resume(run_dir: Path, overrides: Sequence[str], *, config_dir: Path | None, force: bool, dry_run: bool) -> int:
    config = override_frozen(run_dir, overrides, force=force, config_dir=config_dir)
    if not any(text.lstrip("+~").startswith("parallel") for text in overrides):
        config, notes = relayout(resolve_world(config, find_hardware().num_gpus), always=True)
        for note in notes:
            print(note, flush=True)
    if not dry_run:
        check_free(run_dir)  # a live run's STOP is its own
        (run_dir / "STOP").unlink(missing_ok=True)
    return start(config, overrides, dry_run=dry_run, force=force)
