"""A real Slurm of two nodes on this machine: its own munged, controller and two slurmd, in a folder, ended by their ids.

Nothing outside of the folder is touched. Debian's `slurm-wlm` and `munge` are all it needs; `slurmd` wants to be root.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol")
NODES = ("n1", "n2")

CONFIG = """
ClusterName=anyshard
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=2
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobRequeue=1
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmdTimeout=10
KillWait=10
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} RealMemory=1000
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus} RealMemory=1000
PartitionName=test Nodes=n1,n2 Default=YES MaxTime=1:00:00 State=UP OverSubscribe=FORCE:4
"""


def why_not() -> str | None:
    """Why no Slurm can be started here; None where it can."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        return f"{', '.join(missing)} not installed: apt-get install slurm-wlm munge"
    return "slurmd starts jobs of other users and needs root" if os.geteuid() != 0 else None


@dataclass
class Cluster:
    """A running cluster."""

    folder: Path
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def env(self) -> dict[str, str]:
        """Variables with which commands find it."""
        path = os.pathsep.join([os.environ["PATH"], "/usr/sbin"])
        return {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": path}

    def run(self, *command: str) -> str:
        """Run a command of Slurm; returns what it prints."""
        done = subprocess.run(command, env={**os.environ, **self.env}, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, ...; from the controller, which remembers jobs that have ended."""
        shown = self.run("scontrol", "show", "job", "-o", job)
        return shown.split("JobState=")[1].split()[0]

    def wait_for(self, job: str, *states: str, timeout_s: float = 120) -> str:
        """Wait until a job is in one of the states."""
        until = time.monotonic() + timeout_s
        while (state := self.state(job)) not in states:
            assert time.monotonic() < until, f"job {job} is {state} and not {states} after {timeout_s} s"
            time.sleep(0.2)
        return state

    def start(self, name: str, command: Sequence[str]) -> None:
        """Start a daemon."""
        with (self.folder / f"{name}.out.log").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                command,
                env={**os.environ, **self.env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_unblock,
            )

    def lose_node(self, name: str) -> None:
        """End a node as a power failure does: its slurmd and all that runs under it."""
        self.daemons[name].kill()
        self.daemons[name].wait()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                told = process.environ()
                if str(self.folder) in told.get("SLURM_CONF", "") and told.get("SLURMD_NODENAME") == name:
                    process.kill()

    def bring_back(self, name: str) -> None:
        """Start a lost node again, and wait until jobs may have it."""
        self.start(name, ["slurmd", "-D", "-N", name])
        _wait(lambda: "idle" in self.run("sinfo", "-h", "-n", name, "-o", "%T"), f"idle {name}", self)

    def logs(self) -> str:
        """The end of what the daemons say, for a failed test."""
        return "\n".join(f"== {path.name}\n{path.read_text()[-2000:]}" for path in sorted(self.folder.glob("*.log")))


@contextlib.contextmanager
def slurm_cluster(folder: Path) -> Iterator[Cluster]:
    """A cluster in this folder, whose path must be short (a socket lies in it); ends with the block."""
    cluster = Cluster(folder)
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    for name in ("state", *NODES):
        (folder / name).mkdir()
    cpus = len(os.sched_getaffinity(0))
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, ports=_free_ports(3), cpus=cpus))
    files = [f"--{name}={folder}/munge{suffix}" for name, suffix in _MUNGE.items()]
    commands = [
        # a folder of root's below /tmp is safe enough for a test
        ("munged", ["munged", "--foreground", "--force", *files]),
        ("slurmctld", ["slurmctld", "-D", "-i"]),
        *((node, ["slurmd", "-D", "-N", node]) for node in NODES),
    ]
    try:
        for name, command in commands:
            cluster.start(name, command)
            if name == "munged":
                _wait(lambda: (folder / "munge.socket").exists(), "munged", cluster)
        _wait(lambda: cluster.run("sinfo", "-h", "-o", "%T %D") == "idle 2", "two idle nodes", cluster)
        yield cluster
    finally:
        end_jobs(cluster)
        daemons = list(reversed(cluster.daemons.values()))
        for daemon in daemons:
            daemon.send_signal(signal.SIGTERM)
        for daemon in daemons:
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


_MUNGE = {
    "key-file": ".key",
    "socket": ".socket",
    "pid-file": "d.pid",
    "log-file": "d.log",
    "seed-file": ".seed",
}


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def end_jobs(cluster: Cluster) -> None:
    """Kill every job and wait until the queue is empty."""
    with contextlib.suppress(AssertionError, subprocess.TimeoutExpired, OSError):
        cluster.run("scancel", "--user=root")
        cluster.run("scancel", "--user=root", "--signal=KILL", "--full")
        until = time.monotonic() + 15
        while cluster.run("squeue", "-h") and time.monotonic() < until:
            time.sleep(0.2)


def _wait(condition, what: str, cluster: Cluster, timeout_s: float = 30) -> None:  # type: ignore[no-untyped-def]
    until = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(AssertionError):  # the controller does not answer yet
            if condition():
                return
        if time.monotonic() > until:
            raise RuntimeError(f"no {what} after {timeout_s} s\n{cluster.logs()}")
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


if __name__ == "__main__":  # python -m helpers.slurm FOLDER: a cluster to play with, until a signal
    signals = (signal.SIGINT, signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    with slurm_cluster(Path(sys.argv[1])) as running:
        print(f"export SLURM_CONF={running.env['SLURM_CONF']}", flush=True)
        signal.sigwait(signals)
