"""The ranks of one node of a run that is frozen already: `python -m anyshard.launch.node RUN --node-rank 1`.

What `launch=torchrun` tells people to start on the other nodes, and what a Slurm job starts on each node with
`launch.slurm.starter=torchrun`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from anyshard.configs import schema
from anyshard.configs.errors import AnyshardError
from anyshard.configs.frozen import load_frozen
from anyshard.configs.run_lock import START_LOCK, only_run
from anyshard.launch.backend_torchrun import TorchrunBackend
from anyshard.launch.env import find_hardware
from anyshard.launch.spec import LaunchSpec, build_spec


def main(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> int:
    """Run the ranks of this node to their end; returns the exit code of the run."""
    parser = argparse.ArgumentParser(prog="python -m anyshard.launch.node", description="The ranks of one node of a run.")
    parser.add_argument("run", type=Path, help="the run directory")
    parser.add_argument("--node-rank", type=int, help="number of this node; from Slurm where it is not given")
    parser.add_argument("--host", help="where the nodes meet; MASTER_ADDR, or launch.torchrun.host")
    arguments = parser.parse_args(argv)
    try:
        spec = node_spec(arguments.run.absolute(), arguments.node_rank, arguments.host, environ)
        backend = TorchrunBackend()
        backend.check(spec)
        # rank 0 freezes what it was given; under `anyshard train` the launcher holds this lock
        with only_run(spec.run_dir, START_LOCK) if spec.node_rank == 0 else nullcontext():
            return backend.submit(spec)
    except AnyshardError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code


def node_spec(run_dir: Path, node_rank: int | None, host: str | None, environ: Mapping[str, str]) -> LaunchSpec:
    """The launch of one node; under srun its number, and where nodes meet, are known from the environment.

    Raises:
        ConfigError: there is no run.
    """
    config = load_frozen(run_dir)
    spec = build_spec(config, run_dir, find_hardware())
    under_slurm = "SLURM_STEP_ID" in environ
    if node_rank is None:
        node_rank = int(environ["SLURM_NODEID"]) if under_slurm else 0
    torchrun = replace(spec.options.torchrun, host=host or spec.options.torchrun.host)
    port = spec.port
    if under_slurm:
        port = port or int(environ["MASTER_PORT"])
        # the agents' numbers are Slurm's, so that a rank is found on the node that Slurm shows
        torchrun = replace(
            torchrun, host=host or environ.get("MASTER_ADDR") or torchrun.host, rendezvous=schema.Rendezvous.static
        )
        # of the nodes that Slurm gave, which may be fewer than launch.nodes
        spec = replace(
            spec, nodes=int(environ["SLURM_STEP_NUM_NODES"]), options=replace(spec.options, min_nodes=None, max_nodes=None)
        )
    return replace(spec, node_rank=node_rank, port=port, options=replace(spec.options, torchrun=torchrun))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
