"""What a backend is given, and what a backend is."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from anyshard.configs import schema
from anyshard.launch.env import Hardware
from anyshard.offload.op_cache import op_env


@dataclass(frozen=True)
class LaunchSpec:
    """Everything needed to start the ranks of one frozen run directory.

    Attributes:
        env: variables set for the ranks on top of the present environment.
    """

    run_dir: Path
    nodes: int
    procs_per_node: int
    port: int | None
    python: str
    env: dict[str, str]


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
        variables = "".join(f"{name}={value} \\\n" for name, value in sorted(self.env.items()))
        files = "".join(f"\n# {path}\n{text}" for path, text in self.files.items())
        return variables + " ".join(self.argv) + files


class Backend(Protocol):
    """Starts ranks: `render` is pure, `check` looks, `submit` does it. A new backend is one class and one registry entry."""

    def render(self, spec: LaunchSpec) -> Rendered:
        """What `submit` would run."""

    def check(self, spec: LaunchSpec) -> None:
        """Refuse what cannot start here, before anything is written.

        Raises:
            EnvError: what is missing or in the way.
        """

    def submit(self, spec: LaunchSpec) -> int:
        """Start the ranks; returns the exit code of the run (0, 1, 2, 3 or 75)."""


def build_spec(config: schema.Config, run_dir: Path, hardware: Hardware) -> LaunchSpec:
    """The launch of a configuration whose `launch.procs_per_node` is a number."""
    procs = int(config.launch.procs_per_node)
    threads = config.launch.threads_per_proc or max(1, hardware.num_cores // procs)
    env = {
        "OMP_NUM_THREADS": str(threads),
        **op_env(),
        "PYTHONUNBUFFERED": "1",
        # the tokenizers library warns, and stops being parallel, when a process that used it forks
        "TOKENIZERS_PARALLELISM": "false",
    }
    if hardware.num_gpus == 0:
        env["DS_ACCELERATOR"] = "cpu"
    else:
        # freed blocks of odd sizes are joined instead of kept apart: fewer out-of-memory errors under ZeRO-3
        env["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    return LaunchSpec(run_dir, config.launch.nodes, procs, config.launch.port, sys.executable, {**env, **config.launch.env})
