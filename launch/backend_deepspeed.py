"""`launch=deepspeed`: DeepSpeed's own launcher on the hosts of a hostfile, by pdsh, Open MPI, or by hand on every node.

The launcher knows no exit codes but its own: how the run ended is read from its events. It forwards no variables of ours
by itself, so they are written into a file that it reads (DS_ENV_FILE).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from anyshard.configs.errors import (
    EXIT_CONFIG,
    EXIT_DONE,
    EXIT_ENVIRONMENT,
    EXIT_FAILED,
    EXIT_REQUEUE,
    ConfigError,
    EnvError,
    Problem,
)
from anyshard.configs.run_lock import LAUNCHER_VARIABLE
from anyshard.configs.schema import Runner
from anyshard.launch import hostfile
from anyshard.launch.backend_local import signals_of_people
from anyshard.launch.failures import Failure, append, first_cause, read_records
from anyshard.launch.runs import ended_with_a_stop, last_attempt, read_events
from anyshard.launch.spec import LaunchSpec, Rendered, require_gpus

DEFAULT_PORT = 29500
PROGRAMS = {Runner.pdsh: "pdsh", Runner.openmpi: "mpirun"}
FIXES = {Runner.pdsh: "apt-get install pdsh", Runner.openmpi: "apt-get install openmpi-bin"}


class DeepspeedBackend:
    """The deepspeed command, with a hostfile and a file of variables."""

    def render(self, spec: LaunchSpec) -> Rendered:
        """The command and its files.

        Raises:
            ConfigError: the hostfile or the choice of hosts is wrong.
        """
        options = spec.options.deepspeed
        folder = spec.run_dir / "launch"
        hosts = read_hosts(spec)
        hostfile_path = Path(options.hostfile).absolute() if options.hostfile else folder / "hostfile"
        master = options.master_addr or next(iter(hostfile.select(hosts, options.include, options.exclude)))
        port = str(spec.port or DEFAULT_PORT)
        env = {**spec.env, LAUNCHER_VARIABLE: "deepspeed", "ANYSHARD_ERRORS": str(folder / "errors")}
        if options.runner is Runner.openmpi:  # mpirun says nothing about where to meet
            env |= {"MASTER_ADDR": master, "MASTER_PORT": port}
        argv = [
            *(spec.python, "-m", "deepspeed.launcher.runner"),
            *("--hostfile", str(hostfile_path)),
            *(["--include", options.include] if options.include else []),
            *(["--exclude", options.exclude] if options.exclude else []),
            *("--master_addr", master, "--master_port", port),
            *_runner(spec),
            *(["--launcher_args", options.launcher_args] if options.launcher_args else []),
            *("--module", "anyshard.trainer.run", "--run-dir", str(spec.run_dir)),
        ]
        files = {} if options.hostfile else {hostfile_path: hostfile.render(hosts)}
        variables = "".join(f"{name}={value}\n" for name, value in sorted(env.items()))  # as they are: no shell reads this
        files[folder / "deepspeed.env"] = variables
        return Rendered(argv, {**env, "DS_ENV_FILE": str(folder / "deepspeed.env")}, files)

    def check(self, spec: LaunchSpec) -> None:
        """As many ranks as were asked for, and the program that reaches other nodes.

        Raises:
            ConfigError: the hosts do not fit launch.nodes and launch.procs_per_node.
            EnvError: pdsh or mpirun is missing.
        """
        require_gpus(spec)
        options = spec.options.deepspeed
        chosen = hostfile.select(read_hosts(spec), options.include, options.exclude)
        counts = {len(slots) for slots in chosen.values()}
        if len(chosen) != spec.nodes or counts != {spec.procs_per_node}:
            there = ", ".join(f"{host} with {len(slots)} slots" for host, slots in chosen.items())
            fix = f"Set launch.nodes={len(chosen)}"
            fix += f" launch.procs_per_node={counts.pop()}." if len(counts) == 1 else ", and give each host as many slots."
            raise ConfigError(Problem("launch.nodes", spec.nodes, f"the hosts that are used are {there}.", fix))
        if options.runner is Runner.openmpi and (options.include or options.exclude):
            fix = "Write a hostfile of the hosts that you want, or use launch.deepspeed.runner=pdsh."
            raise ConfigError(
                Problem("launch.deepspeed.include", options.include or options.exclude, "runner=openmpi cannot choose.", fix)
            )
        program = PROGRAMS.get(options.runner)
        if spec.nodes > 1 and program is not None and shutil.which(program) is None:
            raise EnvError(
                f"launch.deepspeed.runner={options.runner.value}: {program} is not installed. "
                f"Install it ({FIXES[options.runner]}), or use launch.deepspeed.runner=no_ssh or launch=torchrun."
            )

    def submit(self, spec: LaunchSpec) -> int:
        """Run the ranks to their end. A signal asks them to stop by the file STOP, which reaches every node.

        Raises:
            EnvError: the run directory cannot be written.
        """
        rendered = self.render(spec)
        rendered.write()
        if spec.options.deepspeed.runner is Runner.no_ssh and spec.nodes > 1:
            print("start the same command on every node, with --node_rank 1, 2, ...:", file=sys.stderr)
            print(rendered.text(), file=sys.stderr, flush=True)
        errors = spec.run_dir / "launch" / "errors"
        shutil.rmtree(errors, ignore_errors=True)
        errors.mkdir()
        wishes: list[int] = []

        def stop(signum: int, frame: FrameType | None) -> None:
            wishes.append(signum)
            if len(wishes) == 1:
                (spec.run_dir / "STOP").touch()
                print("stopping with a save; press twice more to end without", file=sys.stderr)
            elif len(wishes) >= 3:
                os.killpg(process.pid, signal.SIGKILL)

        process = subprocess.Popen(rendered.argv, env={**os.environ, **rendered.env}, start_new_session=True)
        before = {number: signal.signal(number, stop) for number in signals_of_people()}
        try:
            code = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if ended_with_a_stop(spec.run_dir):
            return EXIT_REQUEUE
        if code == EXIT_REQUEUE or (
            code == EXIT_DONE and any(event["event"] == "done" for event in last_attempt(spec.run_dir))
        ):
            return code
        # deepspeed 0.19.8 launcher/runner.py ends with 0 when what it started was killed
        records = read_records(errors)
        silent = f"the deepspeed launcher ended without a word; see {spec.run_dir}/logs"
        known = code if code in (EXIT_CONFIG, EXIT_ENVIRONMENT) else EXIT_FAILED
        failure = first_cause(records) or next(iter(records), Failure(time.time(), "unknown", silent, known))
        print(failure.told(spec.run_dir / "logs") if records else failure.message, file=sys.stderr)
        append(spec.run_dir, failure, read_events(spec.run_dir))
        return failure.exit_code


def read_hosts(spec: LaunchSpec) -> dict[str, int]:
    """Slots by host: from the hostfile, from the list of hosts, or this host alone.

    Raises:
        ConfigError: both are given, or the file cannot be read.
    """
    options = spec.options.deepspeed
    if options.hostfile and options.hosts:
        fix = "Give one of the two."
        raise ConfigError(Problem("launch.deepspeed.hosts", options.hosts, "launch.deepspeed.hostfile is given as well.", fix))
    if options.hostfile:
        try:
            text = Path(options.hostfile).read_text(encoding="utf-8")
        except OSError as error:
            fix = "Give a file with a line HOST slots=N for each node, or launch.deepspeed.hosts=[...]."
            reason = f"it cannot be read ({error.strerror})."
            raise ConfigError(Problem("launch.deepspeed.hostfile", options.hostfile, reason, fix)) from error
        return hostfile.parse(text, "launch.deepspeed.hostfile", options.hostfile)
    return dict.fromkeys(options.hosts or ["localhost"], spec.procs_per_node)


def _runner(spec: LaunchSpec) -> list[str]:
    runner = spec.options.deepspeed.runner
    if spec.nodes == 1:
        return ["--no_ssh_check"]  # the launcher would try to reach even this host by ssh
    if runner is Runner.no_ssh:
        return ["--no_ssh", "--node_rank", str(spec.options.deepspeed.node_rank)]
    return ["--launcher", runner.value]
