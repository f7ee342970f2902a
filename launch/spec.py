"""What a backend is given, and what a backend is."""

from __future__ import annotations

import shlex
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from anyshard.configs import schema
from anyshard.configs.errors import ConfigError, Problem
from anyshard.configs.writing import write_file, writing
from anyshard.launch.env import Hardware
from anyshard.offload.op_cache import op_env


@dataclass(frozen=True)
class LaunchSpec:
    """Everything needed to start the ranks of one frozen run directory.

    Attributes:
        env: variables set for the ranks on top of the present environment.
        options: the group `launch` of the configuration.
        gpus_per_node: accelerators of the nodes that will be used, 0 for CPUs; None where this host cannot tell.
        node_rank: the number of this node, where each node starts its own ranks.
        host: the name of this host.
    """

    run_dir: Path
    nodes: int
    procs_per_node: int
    port: int | None
    python: str
    env: dict[str, str]
    options: schema.Launch = field(default_factory=schema.Launch)
    gpus_per_node: int | None = 0
    node_rank: int = 0
    host: str = "localhost"

    @property
    def node_range(self) -> tuple[int, int] | None:
        """The fewest and the most nodes that will do; None where it is one number."""
        fewest, most = self.options.min_nodes or self.nodes, self.options.max_nodes or self.nodes
        return (fewest, most) if fewest < most else None

    @property
    def torchrun_restarts(self) -> int:
        """Times that torchrun itself starts failed ranks again: on several nodes nobody else reaches all of them."""
        if self.options.name == "local":
            return 0
        several = self.options.name == "torchrun" and self.nodes > 1
        return self.options.torchrun.max_restarts or (self.options.max_restarts if several else 0)


def require_gpus(spec: LaunchSpec) -> None:
    """Refuse more ranks on a node than it has GPUs, where it has any.

    Raises:
        ConfigError: a rank would have none.
    """
    if spec.gpus_per_node and spec.gpus_per_node < spec.procs_per_node:
        why = f"each rank needs a GPU of its own, and a node has {spec.gpus_per_node}."
        hide = ", or hide the GPUs with CUDA_VISIBLE_DEVICES= to train on the CPU" if spec.options.name == "local" else ""
        fix = f"Set it to {spec.gpus_per_node} or auto{hide or ', or correct cluster.devices_per_node'}."
        raise ConfigError(Problem("launch.procs_per_node", spec.procs_per_node, why, fix))


@dataclass(frozen=True)
class Rendered:
    """What would run, as text.

    Attributes:
        files: texts that `submit` writes, by path.
    """

    argv: list[str]
    env: dict[str, str]
    files: dict[Path, str] = field(default_factory=dict)

    def text(self) -> str:
        """As a person would type it."""
        variables = "".join(f"{name}={shlex.quote(value)} \\\n" for name, value in sorted(self.env.items()))
        files = "".join(f"\n# {path}\n{text}" for path, text in self.files.items())
        return variables + shlex.join(self.argv) + files

    def write(self) -> None:
        """Write the files.

        Raises:
            EnvError: a folder cannot be written.
        """
        for path, text in self.files.items():
            with writing(path.parent):
                path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, text)


class Backend(Protocol):
    """Starts ranks: `render` is pure, `check` looks, `submit` does it.

    A new backend is one file, one YAML and one registry entry.
    """

    def render(self, spec: LaunchSpec) -> Rendered:
        """What `submit` would run."""

    def check(self, spec: LaunchSpec) -> None:
        """Refuse what cannot start here, before anything is written.

        Raises:
            EnvError: what is missing or in the way.
        """

    def submit(self, spec: LaunchSpec) -> int:
        """Start the ranks; returns the exit code of the run (0, 1, 2, 3 or 75)."""


REASONS = {
    "OMP_NUM_THREADS": "each rank computes with its own cores; without it every rank takes all of them",
    "TORCH_EXTENSIONS_DIR": "DeepSpeed's operators are built once and found there",
    "PATH": "torch looks for ninja there",
    "PYTHONUNBUFFERED": "what a rank printed last is in its log when it dies",
    "TOKENIZERS_PARALLELISM": "the tokenizers library warns, and stops being parallel, when a process that used it forks",
    "DS_ACCELERATOR": "DeepSpeed need not look for a GPU where there is none",
    "PYTORCH_CUDA_ALLOC_CONF": "freed blocks of odd sizes are joined instead of kept apart: ZeRO-3 runs out of memory later",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "a rank whose peer is gone fails instead of waiting for it on the GPU",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "ranks that torchrun starts again would wait at the addresses of those before them",
    "NCCL_DEBUG": "NCCL names the interface or the peer that it could not reach",
}
"""Why each variable is set; docs/cluster.md shows it."""


def build_spec(config: schema.Config, run_dir: Path, hardware: Hardware) -> LaunchSpec:
    """The launch of a configuration whose `launch.procs_per_node` is a number."""
    procs = int(config.launch.procs_per_node)
    gpus = _gpus_per_node(config, hardware)
    threads = config.launch.threads_per_proc or max(1, hardware.num_cores // procs)
    env = {
        "OMP_NUM_THREADS": str(threads),
        **op_env(),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if not gpus:
        env["DS_ACCELERATOR"] = "cpu"
    else:
        env["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    if gpus and config.launch.nodes > 1:
        env |= {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1", "NCCL_DEBUG": "WARN"}
    return LaunchSpec(
        run_dir,
        config.launch.nodes,
        procs,
        config.launch.port,
        sys.executable,
        {**env, **config.launch.env},
        config.launch,
        gpus,
        host=socket.gethostname(),
    )


def _gpus_per_node(config: schema.Config, hardware: Hardware) -> int | None:
    """Accelerators of a node: as the cluster is described, else those of this host, which in a local launch is the node."""
    if config.launch.name == "local":
        return hardware.num_gpus
    if config.cluster.name == "cpu":
        return 0
    found = config.cluster.devices_per_node or hardware.num_gpus
    return found or (None if config.launch.name == "slurm" else 0)
