"""`launch=local`: torchrun on this host, with its ranks watched, signalled and ended together.

torchrun's own report of a failed rank is kept in logs/launcher.log; people see the first failing rank's error and
nothing above it. Signals go to the ranks directly, since torchrun would kill them after 30 s, save or no save.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from anyshard.configs.errors import EXIT_DONE, EXIT_FAILED, EXIT_REQUEUE, ConfigError, EnvError, Problem
from anyshard.configs.writing import writing
from anyshard.launch.env import is_port_free
from anyshard.launch.spec import LaunchSpec, Rendered

KILLED = re.compile(r"rank\s*:\s*(\d+) \(local_rank: \d+\)\s+exitcode\s*:\s*(-\d+)")
"""Ranks that died by a signal, in torchrun's report (torch/distributed/elastic/multiprocessing/errors/__init__.py)."""

GRACE_S = 10.0
"""Time that the other ranks have to end by themselves once one has failed."""


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
        """One node, and a free port.

        Raises:
            ConfigError: more than this node is asked for.
            EnvError: the port is taken.
        """
        if spec.nodes > 1:
            why = "launch=local starts the ranks of this node alone."
            fix = "Start 'torchrun ... -m anyshard.trainer.run' on every node (README, On a cluster), or set launch.nodes=1."
            raise ConfigError(Problem("launch.nodes", spec.nodes, why, fix))
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
                log = stack.enter_context((logs / "launcher.log").open("ab"))
            env = {**os.environ, **rendered.env, "ANYSHARD_ERRORS": errors}
            # a session of its own: Ctrl-C reaches this process alone, which passes it on
            process = subprocess.Popen(rendered.argv, env=env, stderr=log, start_new_session=True)
            return _watch(process, logs, Path(errors), report_from=log.tell())


def _watch(process: subprocess.Popen[bytes], logs: Path, errors: Path, *, report_from: int) -> int:
    """Wait for torchrun, passing signals on; returns the run's exit code.

    Args:
        errors: where failing ranks write why.
        report_from: offset in launcher.log where this attempt begins.
    """
    wishes: list[int] = []

    def forward(signum: int, frame: FrameType | None) -> None:
        wishes.append(signum)
        if len(wishes) >= 3:
            _kill(process)
            return
        with contextlib.suppress(OSError):  # the terminal may be gone
            if len(wishes) == 2:
                print("still saving; press once more to end without", file=sys.stderr)
        for rank in _ranks(process):
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(signum)

    previous = {number: signal.signal(number, forward) for number in signals_of_people()}
    failed_at: float | None = None
    try:
        while process.poll() is None:
            time.sleep(0.05)
            if failed_at is None and any(errors.glob("*.json")):
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() - failed_at > GRACE_S:
                _kill(process)
        if len(wishes) >= 3:
            print("ended without a save, as asked", file=sys.stderr)
            return EXIT_FAILED
        report = (logs / "launcher.log").read_bytes()[report_from:].decode(errors="replace")
        return _conclude(process.returncode, logs, errors, wished=bool(wishes), report=report)
    finally:
        _kill(process)
        for number, handler in previous.items():
            signal.signal(number, handler)


def signals_of_people() -> list[signal.Signals]:
    """The signals that ask for a stop; a hang-up is none under nohup."""
    asked = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]
    return asked if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [*asked, signal.SIGHUP]


def _ranks(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        children = psutil.Process(process.pid).children()
    except psutil.NoSuchProcess:
        return []
    return children or [psutil.Process(process.pid)]


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End torchrun and every rank under it."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        children = []
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    if process.poll() is None:
        process.kill()
        process.wait()


def _conclude(returncode: int, logs: Path, errors: Path, *, wished: bool, report: str) -> int:
    """The run's exit code; prints the first failing rank's error, and only that.

    Args:
        report: what torchrun wrote about this attempt.
    """
    if returncode == 0:
        return EXIT_DONE
    records = [json.loads(path.read_text()) for path in errors.glob("*.json")]
    causes = [record for record in records if not _is_collateral(record)]
    killed = [
        (int(rank), int(code)) for rank, code in KILLED.findall(report) if int(code) not in (-signal.SIGTERM, -signal.SIGINT)
    ]
    if causes or (records and not killed):
        first = min(causes or records, key=lambda record: record["time"])
        if first["for_people"]:
            print(f"{first['kind']}: {first['message']}", file=sys.stderr)
        else:
            print(
                f"rank {first['rank']} failed (its log: {logs}/rank{first['rank']:05d}.log):\n{first['message']}",
                file=sys.stderr,
            )
        return int(first["exit_code"])
    if _stopped(logs.parent) or (wished and not killed):
        return EXIT_REQUEUE
    for rank, code in killed[:1]:
        name = signal.Signals(-code).name
        hint = " (the kernel does that when memory runs out: see dmesg)" if name == "SIGKILL" else ""
        print(f"rank {rank} was ended by {name}{hint}; its log: {logs}/rank{rank:05d}.log", file=sys.stderr)
    if not killed:
        print(f"the ranks ended without a word; see {logs}/launcher.log", file=sys.stderr)
    return EXIT_FAILED


def _is_collateral(record: dict[str, Any]) -> bool:
    """Whether a rank failed only because another was gone: it says so itself, or DeepSpeed and gloo do."""
    return not record["for_people"] and bool(
        re.search(r"closed by peer|reset by peer|Connection refused|remote worker|Broken pipe", record["message"])
    )


def _stopped(run_dir: Path) -> bool:
    """Whether the last thing that the run recorded is an agreed stop with its save."""
    path = run_dir / "events.jsonl"
    if not path.exists():
        return False
    events = [json.loads(line)["event"] for line in path.read_text().splitlines()]
    last_start = len(events) - 1 - events[::-1].index("start") if "start" in events else 0
    return "stop" in events[last_start:]
