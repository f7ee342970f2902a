"""The keys of the configuration group `launch`; the part of `schema.py` that says how ranks are started."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Optional, Union

from anyshard.configs.fields import key


class Starter(Enum):
    srun = "srun"
    torchrun = "torchrun"


class Rendezvous(Enum):
    c10d = "c10d"
    static = "static"


class NodeCheck(Enum):
    warn = "warn"
    strict = "strict"
    skip = "skip"


class Runner(Enum):
    pdsh = "pdsh"
    openmpi = "openmpi"
    no_ssh = "no_ssh"


@dataclass
class Torchrun:
    rendezvous: Rendezvous = key(
        Rendezvous.c10d,
        "How nodes meet. c10d: by themselves, in any order. static: each is told its number.",
        why="nodes need no numbers and may start in any order",
    )
    host: Optional[str] = key(None, "Name or address of the node that starts the run, where nodes meet.", why="null: this host")
    max_restarts: int = key(
        0,
        "Times that torchrun itself starts the ranks anew after one has failed, on all nodes and on those that are left.",
        ge=0,
        unit="restarts",
        why="torchrun's own default: the first failure ends the run",
    )


@dataclass
class DeepspeedLauncher:
    hostfile: Optional[str] = key(None, "File with a line 'HOST slots=N' for each node.", why="null: one is written from hosts")
    hosts: list[str] = key(
        [],
        "Names of the nodes, each with launch.procs_per_node slots.",
        why="empty: this host alone, unless there is a hostfile",
    )
    include: Optional[str] = key(None, "Hosts and slots that are used: 'node0@node1:0,2'.", why="null: all of them")
    exclude: Optional[str] = key(None, "Hosts and slots that are not used.", why="null: none")
    runner: Runner = key(
        Runner.pdsh,
        "How other nodes are reached; no_ssh: the same command is given on every node.",
        why="the deepspeed launcher's own default",
    )
    node_rank: int = key(0, "Number of this node, with runner no_ssh.", ge=0, why="the first node")
    master_addr: Optional[str] = key(None, "Address of the first node.", why="null: the first host")
    launcher_args: str = key("", "Arguments handed to pdsh or mpirun.")


@dataclass
class Slurm:
    account: Optional[str] = key(None, "Account that is charged.", why="null: the user's default account")
    partition: Optional[str] = key(None, "Partition.", why="null: the cluster's default")
    qos: Optional[str] = key(None, "Quality of service.", why="null: the cluster's default")
    time_min: Optional[int] = key(None, "Time limit.", unit="min", gt=0, why="null: the partition's")
    constraint: Optional[str] = key(None, "Features that nodes must have.", why="null: any node will do")
    reservation: Optional[str] = key(None, "Reservation.", why="null: none")
    nodelist: Optional[str] = key(None, "Nodes that must be used.", why="null: Slurm chooses")
    exclude: Optional[str] = key(None, "Nodes that must not be used.", why="null: none")
    exclusive: bool = key(
        False, "Share nodes with no other job.", why="a job smaller than a node would hold the rest of it idle"
    )
    gpu_type: Optional[str] = key(None, "Type of the GPUs, as in --gpus-per-node=h100:8.", why="null: any")
    gres: Optional[str] = key(
        None,
        "Generic resources of a node, instead of --gpus-per-node: 'gpu:h100:8'.",
        why="null: --gpus-per-node, a GPU for each rank",
    )
    cpus_per_task: Optional[int] = key(None, "Cores of each rank.", gt=0, why="null: the cluster's default", unit="cores")
    mem: Optional[str] = key(
        None, "Host memory of a node, as Slurm writes it: '200G', '0' for all.", why="null: the cluster's default"
    )
    array: Optional[int] = key(
        None,
        "Submit a chain of so many jobs, each of which goes on where the last one stopped, instead of requeueing.",
        ge=2,
        unit="jobs",
        why="null: one job, which is requeued",
    )
    requeue: bool = key(
        True,
        "A job that is warned or preempted saves, goes back into the queue and continues.",
        why="a long run goes on without anybody to submit it again",
    )
    warn_s: int = key(
        120,
        "Slurm warns so long before the time limit; the ranks save and end.",
        unit="s",
        ge=10,
        le=65535,
        why="time for the present step and a save",
    )
    starter: Starter = key(
        Starter.srun,
        "srun: Slurm starts every rank. torchrun: Slurm starts one torchrun on each node, which starts the ranks.",
        why="srun: one layer less; Slurm sees each rank, and ends all when one fails",
    )
    container_image: Optional[str] = key(
        None, "Image that the ranks run in (pyxis: srun --container-image).", why="null: on the node itself"
    )
    container_mounts: list[str] = key([], "Mounts of the container: '/data:/data:ro'; the run directory is added.")
    modules: list[str] = key([], "Modules that are loaded first.")
    prologue: list[str] = key([], "Lines of bash before the ranks start.")
    directives: list[str] = key([], "More '#SBATCH' options: '--mail-type=FAIL'.")
    srun_args: list[str] = key([], "More options of srun.")
    python: Optional[str] = key(None, "Python on the nodes.", why="null: the one that submits")
    template: Optional[str] = key(
        None,
        "Template of your own for the script.",
        why="null: ours, launch/templates/slurm.sbatch.j2",
    )


@dataclass
class Launch:
    name: str = key(
        "local",
        "Registered backend that starts the ranks: local, torchrun, deepspeed, slurm, or a plugin's.",
        why="needs nothing but this machine",
    )
    nodes: int = key(1, "Nodes.", ge=1, unit="nodes", why="this machine")
    min_nodes: Optional[int] = key(
        None,
        "Go on with as few nodes as this where fewer are free: dp is derived anew, the global batch stays.",
        unit="nodes",
        ge=1,
        why="null: launch.nodes, no fewer and no more",
    )
    max_nodes: Optional[int] = key(
        None,
        "Take as many nodes as this where they are free: dp is derived anew, the global batch stays.",
        unit="nodes",
        ge=1,
        why="null: launch.nodes",
    )
    procs_per_node: Union[int, str] = key(
        "auto",
        "Ranks on each node; auto: one per GPU, or 1 without.",
        unit="ranks",
        ge=1,
        why="auto: NCCL takes one rank a GPU",
    )
    port: Optional[int] = key(
        None,
        "Port of the rendezvous.",
        ge=1,
        le=65535,
        why="null: a free port; 29500 with several nodes; on Slurm by the job's id",
    )
    timeout_s: float = key(
        600.0, "A collective that waits longer than this fails.", unit="s", gt=0, why="torch's own default for NCCL, 10 minutes"
    )
    threads_per_proc: Optional[int] = key(
        None, "OMP threads of each rank.", ge=1, why="null: cores / procs_per_node", unit="threads"
    )
    env: dict[str, str] = key({}, "Extra environment variables of the ranks.")
    max_restarts: int = key(
        0,
        "After a failure that a restart may cure the ranks are started again, so often in a row without a new checkpoint.",
        unit="restarts",
        ge=0,
        why="the first failure ends the run; 3 with launch=slurm, where nobody watches",
    )
    backoff_s: float = key(
        10.0,
        "Wait before the first restart; it doubles with each, up to ten minutes.",
        unit="s",
        ge=0,
        why="time for ports, GPUs and file systems to recover",
    )
    preflight: NodeCheck = key(
        NodeCheck.warn,
        "Compare and time several nodes before the first step. warn: name a slow one; strict: refuse it too; skip: do nothing.",
        why="seconds; all nodes wait for a slow one at every step",
    )
    preflight_timeout_s: float = key(
        60.0, "A node that does not answer the check for so long is broken.", unit="s", gt=0, why="a healthy one needs seconds"
    )
    lost_after_s: Optional[float] = key(
        30.0,
        "A node that is silent for so long has lost its network or its power: the run ends and names it.",
        unit="s",
        gt=0,
        why="nodes say something five times in it; null: a collective waits launch.timeout_s for it",
    )
    slow_factor: float = key(
        2.0,
        "A node is slow that takes so many times as long as the median of all.",
        gt=1,
        why="above the noise of a shared network",
    )
    torchrun: Torchrun = field(default_factory=Torchrun)
    deepspeed: DeepspeedLauncher = field(default_factory=DeepspeedLauncher)
    slurm: Slurm = field(default_factory=Slurm)
