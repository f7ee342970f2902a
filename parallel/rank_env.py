"""Which rank this process is, by the environment of whatever started it. No torch here.

Understood are torchrun, the deepspeed launcher, srun, mpirun (Open MPI, MPICH, Intel MPI, MVAPICH) and plain variables.
Launchers nest (srun starts torchrun, which starts ranks), so the innermost one that speaks decides, and the others are
only asked whether that can be true.
"""

from __future__ import annotations

import re
import socket
import subprocess
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from anyshard.configs.errors import EnvError

FIRST_PORT, NUM_PORTS = 20000, 10000
"""Ports derived from a job's id: below those that Linux hands out by itself (32768 and up)."""


@dataclass(frozen=True)
class RankEnv:
    """What a launcher tells a rank."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    master_addr: str
    master_port: int


@dataclass(frozen=True)
class Variables:
    """How one kind of launcher names things.

    Attributes:
        mark: a variable that only this launcher sets.
        job: variables that hold one value for all ranks of a job and another for another job.
    """

    launcher: str
    mark: str
    rank: str
    size: str
    local_rank: str
    local_size: str
    job: tuple[str, ...] = ()


_TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
LAUNCHERS = (
    Variables("torchrun", "TORCHELASTIC_RUN_ID", *_TORCH, "LOCAL_WORLD_SIZE"),
    Variables("the deepspeed launcher", "CROSS_RANK", *_TORCH, "LOCAL_SIZE"),
    Variables("the environment", "RANK", *_TORCH, "LOCAL_WORLD_SIZE"),
    Variables("the environment", "WORLD_SIZE", *_TORCH, "LOCAL_WORLD_SIZE"),
    Variables(
        "mpirun (Open MPI)",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
    ),
    Variables(
        "mpirun (MVAPICH)",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
    Variables("mpirun (MPICH or Intel MPI)", "PMI_RANK", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    # a batch script has SLURM_PROCID as well; only tasks of srun have a step
    Variables("srun", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ""),
)
"""From the innermost outwards."""


@dataclass(frozen=True)
class Place:
    """What one launcher says about this process; None where it does not."""

    by: Variables
    rank: int
    size: int
    local_rank: int | None
    local_size: int | None

    def __str__(self) -> str:
        return f"{self.by.launcher} says {self.by.rank}={self.rank} of {self.by.size}={self.size}"


def discover(environ: Mapping[str, str], resolve: Callable[[str], str] | None = None) -> RankEnv:
    """This process's place among the ranks; no launcher at all means that it is the only one.

    Args:
        resolve: turns a node's name in Slurm into an address that can be connected to; `address_of` by default.

    Raises:
        EnvError: launchers contradict each other, or what they say is incomplete or impossible.
    """
    places = _places(environ)
    if not places:
        return RankEnv(0, 0, 1, 1, "127.0.0.1", free_port())
    inner = places[0]
    for outer in places[1:]:
        _require_agreement(inner, outer)
    same = [place for place in places if (place.rank, place.size) == (inner.rank, inner.size)]
    local_rank = next((place.local_rank for place in same if place.local_rank is not None), None)
    local_size = next((place.local_size for place in same if place.local_size is not None), None)
    if local_size is None:
        local_size = inner.size
    if local_rank is None:
        local_rank = inner.rank % local_size
    if not 0 <= local_rank < local_size or inner.size % local_size:
        raise EnvError(
            f"{inner}, with local rank {local_rank} of {local_size}: every node must have the same number of ranks. "
            "Start as many on each."
        )
    addr, port = _master(environ, same, local_size, resolve or address_of)
    return RankEnv(inner.rank, local_rank, inner.size, local_size, addr, port)


def rank_of(environ: Mapping[str, str]) -> int:
    """The rank for the name of a log; 0 where it cannot be known (`discover` has more to say about that)."""
    try:
        places = _places(environ)
    except EnvError:
        return 0
    return places[0].rank if places else 0


def host_name(environ: Mapping[str, str]) -> str:
    """The name of this host: Slurm's, which its commands know it by, where there is one."""
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


def is_restart(environ: Mapping[str, str]) -> bool:
    """Whether the launcher, torchrun or Slurm has started this before within one launch, or as an earlier job of a chain."""
    before = {"ANYSHARD_RESTART_COUNT": 0, "TORCHELASTIC_RESTART_COUNT": 0, "SLURM_RESTART_COUNT": 0, "SLURM_ARRAY_TASK_ID": 1}
    return any(int(environ.get(name) or "0") > first for name, first in before.items())


def _places(environ: Mapping[str, str]) -> list[Place]:
    """What each launcher that left traces says, from the innermost outwards."""
    places: list[Place] = []
    for by in LAUNCHERS:
        if by.mark not in environ or any(place.by.rank == by.rank for place in places):
            continue
        missing = [name for name in (by.rank, by.size) if name not in environ]
        if missing:
            raise EnvError(
                f"{', '.join(missing)} not set although {by.mark} is: start the ranks with torchrun, deepspeed, srun or "
                "mpirun, or set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT."
            )
        rank, size = _number(environ, by.rank), _number(environ, by.size)
        if not 0 <= rank < size:
            raise EnvError(f"{by.rank}={rank} with {by.size}={size}: ranks are 0 to {size - 1}.")
        local_rank = _number(environ, by.local_rank) if by.local_rank in environ else None
        local_size = _number(environ, by.local_size) if by.local_size in environ else None
        if by.launcher == "srun":
            local_size = _tasks_here(environ)
        places.append(Place(by, rank, size, local_rank, local_size))
    return places


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise EnvError(f"{name}={environ[name]!r}: it must be a number. Whatever starts the ranks has to set it.") from None


def _tasks_here(environ: Mapping[str, str]) -> int | None:
    """Tasks of this step on this node, from a list such as `2(x3),1` (2 on each of three nodes, 1 on the next)."""
    counts: list[int] = []
    for count, repeat in re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(count)] * int(repeat or 1)
    node = environ.get("SLURM_NODEID", "0")
    if len(set(counts)) > 1:
        raise EnvError(
            f"srun spread the tasks unevenly (SLURM_STEP_TASKS_PER_NODE={environ['SLURM_STEP_TASKS_PER_NODE']}): "
            "every node must have the same number of ranks. Use --ntasks-per-node instead of --ntasks."
        )
    return counts[int(node)] if node.isdecimal() and int(node) < len(counts) else None


def _require_agreement(inner: Place, outer: Place) -> None:
    """Refuse an inner launcher that cannot have been started by the outer one as it stands.

    Raises:
        EnvError: each task of the outer launcher would be a world of its own, or two of them the same rank.
    """
    if inner.size < outer.size:
        raise EnvError(f"{inner}, but {outer}: each of these {outer.size} tasks would train by itself. {_remedy(inner, outer)}")
    if inner.size == outer.size and inner.rank != outer.rank:
        raise EnvError(
            f"{inner}, but {outer}. Variables set before {outer.by.launcher} are the same in every task. "
            f"{_remedy(inner, outer)}"
        )


def _remedy(inner: Place, outer: Place) -> str:
    if inner.by.launcher == "torchrun":
        return f"Give torchrun --nnodes={outer.size} and --node-rank, or start one task only."
    if inner.by.rank == "RANK":
        return f"Unset RANK and WORLD_SIZE: {outer.by.launcher} says enough. Or start one task only."
    return f"Start the ranks with one of them: {inner.by.launcher} or {outer.by.launcher}."


def _master(environ: Mapping[str, str], places: list[Place], local_size: int, resolve: Callable[[str], str]) -> tuple[str, int]:
    """Where the ranks meet: as told by the environment, else derived from what all ranks of the job know."""
    addr, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT")
    if addr and port:
        return addr, _number(environ, "MASTER_PORT")
    if any(place.by.launcher == "srun" for place in places):
        first = first_host(environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"])
        derived = port_of_job(int(environ["SLURM_JOB_ID"]) + int(environ["SLURM_STEP_ID"]))
        return addr or resolve(first), int(port) if port else derived
    inner = places[0]
    job = next((environ[name] for place in places for name in place.by.job if name in environ), None)
    if job is not None and local_size == inner.size:
        return addr or "127.0.0.1", int(port) if port else port_of_job(zlib.crc32(job.encode()))
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
    how = " (mpirun -x MASTER_ADDR=... -x MASTER_PORT=..., or -genv)" if inner.by.launcher.startswith("mpirun") else ""
    raise EnvError(
        f"{', '.join(missing)} not set although {inner.by.rank} is: set them to the host of rank 0 and a free port there{how}, "
        "or start the ranks with torchrun, deepspeed or srun."
    )


def port_of_job(number: int) -> int:
    """The port of a job: the same for all its ranks, another for the next job. The sbatch template computes the same."""
    return FIRST_PORT + number % NUM_PORTS


def first_host(nodelist: str) -> str:
    """The first host of a list as Slurm writes them: `gpu[003-007,012],login1` gives `gpu003`."""
    head = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodelist)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", head.group() if head else nodelist)


def address_of(host: str) -> str:
    """A node's name if it resolves here, else the address that Slurm knows it by."""
    try:
        socket.getaddrinfo(host, None)
        return host
    except OSError:
        pass
    try:
        shown = subprocess.run(["scontrol", "show", "node", "-o", host], capture_output=True, text=True, check=False).stdout
    except OSError:
        return host  # without scontrol the name is all there is; connecting to it will say that it resolves nowhere
    found = re.search(r"NodeAddr=(\S+)", shown)
    return found.group(1) if found else host


def free_port() -> int:
    """A TCP port that nothing listens on at this moment."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
