"""`launch=local`: torchrun on this host, with its ranks watched, signalled and ended together.

torchrun's own report of a failed rank is kept in logs/launcher.log; people see the first failing rank's error and
nothing above it. Signals go to the ranks directly, since torchrun would kill them after 30 s, save or no save. When
torchrun or this process is killed the kernel sends TERM to the ranks, which save and end.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType

import psutil

from anyshard.configs.errors import EXIT_DONE, EXIT_FAILED, EXIT_REQUEUE, ConfigError, EnvError, Problem
from anyshard.configs.run_lock import LAUNCHER_VARIABLE
from anyshard.configs.writing import writing
from anyshard.launch.env import is_port_free
from anyshard.launch.failures import Failure, append, first_cause, read_records
from anyshard.launch.runs import ended_with_a_stop, last_attempt, read_events
from anyshard.launch.spec import LaunchSpec, Rendered, require_gpus
from anyshard.parallel.parent import signal_when_parent_dies

KILLED = re.compile(r"rank\s*:\s*(\d+) \(local_rank: \d+\)\s+exitcode\s*:\s*(-\d+)")
"""Ranks that died by a signal, in torchrun's report (torch/distributed/elastic/multiprocessing/errors/__init__.py)."""
WENT = re.compile(rf"exitcode\s*:\s*{EXIT_REQUEUE}\b")
"""A rank that ended as it was asked to. torchrun kills those that do not follow in 30 s, such as one inside gloo's connect."""

GRACE_S = 10.0
"""Time that the other ranks have to end by themselves once one has failed; NCCL may keep them waiting for it for ever."""


class LocalBackend:
    """Ranks on this host under torchrun."""

    def render(self, spec: LaunchSpec) -> Rendered:
        """The torchrun command. With no port, torchrun itself takes a free one."""
        rendezvous = ["--standalone"] if spec.port is None else [f"--master-port={spec.port}", "--master-addr=127.0.0.1"]
        argv = [
            spec.python,
            "-m",
            "torch.distributed.run",
            f"--nproc-per-node={spec.procs_per_node}",
            *rendezvous,
            "-m",
            "anyshard.trainer.run",
            "--run-dir",
            str(spec.run_dir),
        ]
        return Rendered(argv, spec.env)

    def check(self, spec: LaunchSpec) -> None:
        """One node, a GPU for each rank where there are any, and a free port.

        Raises:
            ConfigError: more than this node, or more than its GPUs, is asked for.
            EnvError: the port is taken.
        """
        if spec.nodes > 1:
            why = "launch=local starts the ranks of this node alone."
            fix = "Use launch=slurm, launch=torchrun or launch=deepspeed (docs/cluster.md), or set launch.nodes=1."
            raise ConfigError(Problem("launch.nodes", spec.nodes, why, fix))
        require_gpus(spec)
        if spec.port is not None and not is_port_free(spec.port):
            raise EnvError(
                f"launch.port={spec.port}: something listens on this port already. "
                "Choose another, or launch.port=null for a free one."
            )

    def submit(self, spec: LaunchSpec) -> int:
        """Run the ranks to their end.

        Raises:
            EnvError: the run directory cannot be written.
        """
        rendered = self.render(spec)
        logs = spec.run_dir / "logs"
        with contextlib.ExitStack() as stack:
            # in memory: a rank that fails because the disk is full must still be able to say so
            shm = Path("/dev/shm")
            errors = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="anyshard-", dir=shm if os.access(shm, os.W_OK) else None)
            )
            with writing(spec.run_dir):
                logs.mkdir(parents=True, exist_ok=True)
                log = stack.enter_context((logs / log_name(spec)).open("ab"))
            ranks = "1 rank" if spec.procs_per_node == 1 else f"{spec.procs_per_node} ranks"
            print(f"starting {ranks}; logs: {logs}", flush=True)
            env = {**os.environ, **rendered.env, "ANYSHARD_ERRORS": errors, LAUNCHER_VARIABLE: str(os.getpid())}
            # a session of its own: Ctrl-C reaches this process alone, which passes it on
            process = subprocess.Popen(
                rendered.argv,
                env=env,
                stderr=log,
                start_new_session=True,
                preexec_fn=partial(_before_torchrun, os.getpid()),
            )
            again = bool(spec.torchrun_restarts)
            return _watch(process, Path(log.name), Path(errors), report_from=log.tell(), restarts=again)


def _before_torchrun(parent: int) -> None:
    # KILL: on TERM torchrun would kill the ranks after 30 s; on its death they save and end
    signal_when_parent_dies(signal.SIGKILL, parent)
    for number in (signal.SIGUSR1, signal.SIGUSR2):  # Slurm sends them to every process; the ranks do handle them
        signal.signal(number, signal.SIG_IGN)


def log_name(spec: LaunchSpec) -> str:
    """The file of torchrun's own words, one for each node."""
    return "launcher.log" if spec.node_rank == 0 else f"launcher-node{spec.node_rank:03d}.log"


class _Tree:
    """torchrun and its ranks, remembered, so that they are found when torchrun is gone."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.torchrun = process
        self._ranks: list[psutil.Process] = []
        self._looked_at = 0.0
        self._trained: dict[int, psutil.Process] = {}

    def ranks(self) -> list[psutil.Process]:
        """The ranks that live; torchrun itself before it has started any."""
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.torchrun.pid)
            self._ranks = parent.children() or self._ranks or [parent]
            self._trained.update({rank.pid: rank for rank in self._ranks if rank.pid not in self._trained and _is_rank(rank)})
        return [rank for rank in self._ranks if _runs(rank)]

    def remind(self, signum: int) -> None:
        """Send a signal to the ranks once more: those that had only just been started did not hear it."""
        for rank in self._trained.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(signum)

    def lives(self) -> bool:
        """Whether any of it does. Looks for new ranks once a second."""
        if self.torchrun.poll() is not None:
            return bool(self.ranks())
        if time.monotonic() - self._looked_at > 1:
            self._looked_at = time.monotonic()
            self.ranks()
        return True

    def has_lost_one(self) -> bool:
        """Whether a rank has ended while others live, as far as `lives` has seen them."""
        alive = sum(_runs(rank) for rank in self._trained.values())
        return 0 < alive < len(self._trained)

    def kill(self) -> None:
        """End torchrun and every process under it."""
        family = self.ranks()
        with contextlib.suppress(psutil.NoSuchProcess):
            family += psutil.Process(self.torchrun.pid).children(recursive=True)
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        if self.torchrun.poll() is None:
            self.torchrun.kill()
            self.torchrun.wait()


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _is_rank(process: psutil.Process) -> bool:
    """Whether torchrun's child is a rank: some other helper may end when it likes."""
    try:
        command = process.cmdline()
    except psutil.Error:
        return False
    return "anyshard.trainer.run" in command and "torch.distributed.run" not in command


def _one_has_failed(tree: _Tree, errors: Path, run_dir: Path, *, wished: bool) -> bool:
    """Whether a rank has said why it failed, or is gone although the run has not come to an end."""
    if any(errors.glob("*.json")):
        return True
    return not wished and tree.has_lost_one() and not any(event["event"] in ("done", "stop") for event in last_attempt(run_dir))


def _watch(process: subprocess.Popen[bytes], log: Path, errors: Path, *, report_from: int, restarts: bool = False) -> int:
    """Wait for torchrun and its ranks, passing signals on; returns the run's exit code.

    Args:
        log: torchrun's words.
        errors: where failing ranks write why.
        report_from: offset in the log where this attempt begins.
        restarts: torchrun starts all ranks again once one has failed.
    """
    wishes: list[int] = []
    tree = _Tree(process)

    def forward(signum: int, frame: FrameType | None) -> None:
        wishes.append(signum)
        if len(wishes) >= 3:
            tree.kill()
            return
        with contextlib.suppress(OSError):  # the terminal may be gone
            if len(wishes) == 2:
                print("still saving; press once more to end without", file=sys.stderr)
        for rank in tree.ranks():
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(signum)

    previous = {number: signal.signal(number, forward) for number in signals_of_people()}
    failed_at: float | None = None
    reminded_at = time.monotonic()
    try:
        while tree.lives():
            time.sleep(0.05)
            if wishes and time.monotonic() - reminded_at > 1:
                reminded_at = time.monotonic()
                tree.remind(wishes[0])
            failed = _one_has_failed(tree, errors, log.parent.parent, wished=bool(wishes))
            failed_at = (failed_at or time.monotonic()) if failed else None
            if failed_at is None or time.monotonic() - failed_at <= GRACE_S:
                continue
            if not restarts or not all(record.is_curable for record in read_records(errors)):
                tree.kill()
        if len(wishes) >= 3:
            print("ended without a save, as asked", file=sys.stderr)
            return EXIT_FAILED
        report = log.read_bytes()[report_from:].decode(errors="replace")
        return _conclude(process.returncode, log.parent, errors, wished=bool(wishes), report=report)
    finally:
        tree.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)


def signals_of_people() -> list[signal.Signals]:
    """The signals that ask for a stop; a hang-up is none under nohup."""
    asked = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]
    return asked if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [*asked, signal.SIGHUP]


def _conclude(returncode: int, logs: Path, errors: Path, *, wished: bool, report: str) -> int:
    """The run's exit code; prints the first failing rank's error, and only that.

    Args:
        report: what torchrun wrote about this attempt.
    """
    if returncode == 0:  # torchrun that restarts ranks is told nothing of a stop: it would take it for a failure
        return EXIT_REQUEUE if ended_with_a_stop(logs.parent) else EXIT_DONE
    records = read_records(errors)
    cause = first_cause(records)
    # before a rank has its handlers a signal of ours ends it as it ends any process
    asked = [signal.SIGTERM, signal.SIGINT, *(signals_of_people() if wished else [])]
    killed = [(int(rank), int(code)) for rank, code in KILLED.findall(report) if -int(code) not in asked]
    first = cause or (min(records, key=lambda record: record.time) if records and not killed else None)
    if first is not None:
        print(first.told(logs), file=sys.stderr)
        append(logs.parent, first, read_events(logs.parent))
        return first.exit_code
    if ended_with_a_stop(logs.parent) or (wished and (not killed or WENT.search(report))):
        return EXIT_REQUEUE
    failure = Failure(time.time(), "unknown", f"the ranks ended without a word; see {logs}/launcher.log", EXIT_FAILED)
    if killed:
        rank, name = killed[0][0], signal.Signals(-killed[0][1]).name
        hint = " (the kernel does that when memory runs out: see dmesg)" if name == "SIGKILL" else ""
        told = f"rank {rank} was ended by {name}{hint}; its log: {logs}/rank{rank:05d}.log"
        failure = replace(failure, kind=name, message=told, rank=rank, host=platform.node())
    if returncode < 0:
        name = signal.Signals(-returncode).name
        failure = replace(failure, kind=name, message=f"torchrun was ended by {name}; its log: {logs}/launcher.log")
    print(failure.message, file=sys.stderr)
    append(logs.parent, failure, read_events(logs.parent))
    return EXIT_FAILED
