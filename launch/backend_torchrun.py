"""`launch=torchrun`: torchrun on this node, alone or with other nodes that each start theirs.

`anyshard train launch=torchrun launch.nodes=2` freezes the run, starts the ranks of this node, and says which command
starts those of the others. They meet at this host by torchrun's own rendezvous (c10d, in any order) or by numbers given
to them (static). Ranks are watched as those of `launch=local` are.
"""

from __future__ import annotations

import shlex
import sys

from anyshard.configs.errors import ConfigError, EnvError, Problem
from anyshard.configs.schema import Rendezvous
from anyshard.launch.backend_local import LocalBackend
from anyshard.launch.env import is_port_free
from anyshard.launch.spec import LaunchSpec, Rendered, require_gpus

DEFAULT_PORT = 29500


class TorchrunBackend(LocalBackend):
    """One torchrun for each node."""

    def render(self, spec: LaunchSpec) -> Rendered:
        """The torchrun command of this node."""
        restarts = spec.torchrun_restarts
        argv = [
            spec.python,
            "-m",
            "torch.distributed.run",
            f"--nnodes={spec.node_range[0]}:{spec.node_range[1]}" if spec.node_range else f"--nnodes={spec.nodes}",
            f"--nproc-per-node={spec.procs_per_node}",
            *_rendezvous(spec),
            *([f"--max-restarts={restarts}"] if restarts else []),
            "-m",
            "anyshard.trainer.run",
            "--run-dir",
            str(spec.run_dir),
        ]
        # torch 2.13.0 distributed/elastic/rendezvous/dynamic_rendezvous.py:1146: by default ranks meet in the agents' store,
        # which outlives an attempt; gloo ranks of the next one were seen to wait at the addresses of those before
        env = {**spec.env, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if restarts else spec.env
        return Rendered(argv, env)

    def check(self, spec: LaunchSpec) -> None:
        """A GPU for each rank where there are any, and a free port where others connect to.

        Raises:
            ConfigError: more than the GPUs of this node is asked for.
            EnvError: the port is taken.
        """
        require_gpus(spec)
        if spec.node_range and spec.options.torchrun.rendezvous is Rendezvous.static:
            why = "with numbers given to nodes none may stay away."
            fix = "Use launch.torchrun.rendezvous=c10d, or leave it out."
            raise ConfigError(Problem("launch.min_nodes", spec.node_range[0], why, fix))
        port = spec.port if spec.nodes == 1 else spec.port or DEFAULT_PORT
        if spec.node_rank == 0 and port is not None and not is_port_free(port):
            raise EnvError(f"launch.port={port}: something listens on this port already. Choose another with launch.port.")

    def submit(self, spec: LaunchSpec) -> int:
        """Run the ranks of this node to their end.

        Raises:
            EnvError: the run directory cannot be written.
        """
        if spec.nodes > 1 and spec.node_rank == 0:
            print(f"start the ranks of the other {spec.nodes - 1} nodes, on each of them:", file=sys.stderr)
            for line in other_nodes(spec):
                print(f"  {line}", file=sys.stderr, flush=True)
        return super().submit(spec)


def _rendezvous(spec: LaunchSpec) -> list[str]:
    if spec.nodes == 1:
        return ["--standalone"] if spec.port is None else [f"--master-port={spec.port}", "--master-addr=127.0.0.1"]
    host, port = spec.options.torchrun.host or spec.host, spec.port or DEFAULT_PORT
    if spec.options.torchrun.rendezvous is Rendezvous.static:
        return [f"--node-rank={spec.node_rank}", f"--master-addr={host}", f"--master-port={port}"]
    # the name of the run keeps nodes of another run, which came to the wrong port, out
    return ["--rdzv-backend=c10d", f"--rdzv-endpoint={host}:{port}", f"--rdzv-id={spec.run_dir.name}"]


def other_nodes(spec: LaunchSpec) -> list[str]:
    """The commands that start the ranks of the other nodes; with c10d one serves for all."""
    start = [spec.python, "-m", "anyshard.launch.node", str(spec.run_dir)]
    host = [] if spec.options.torchrun.host else [f"--host={spec.host}"]
    if spec.options.torchrun.rendezvous is Rendezvous.c10d:
        return [shlex.join([*start, "--node-rank=1", *host])]
    return [shlex.join([*start, f"--node-rank={number}", *host]) for number in range(1, spec.nodes)]
