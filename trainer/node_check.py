"""All nodes: looked at before the first step (which is slow, which cannot be used), and listened to from then on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from anyshard.configs import schema
from anyshard.configs.errors import EnvError, HostLostError
from anyshard.parallel.heartbeat import Heartbeat
from anyshard.parallel.nodes import table
from anyshard.parallel.preflight import Preflight
from anyshard.parallel.rank_env import RankEnv
from anyshard.trainer.metrics import Reporter


def check_nodes(config: schema.Config, env: RankEnv, device: torch.device, reporter: Reporter) -> None:
    """Compare and time the nodes, where there are several.

    Collective: every rank calls it; it blocks.

    Raises:
        EnvError: one cannot be used; names it.
    """
    launch = config.launch
    if env.world_size == env.local_world_size or launch.preflight is schema.NodeCheck.skip:
        return
    tag = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    check = Preflight(env, device, timeout_s=launch.preflight_timeout_s, tag=tag)
    nodes, findings = check.run(slow_factor=launch.slow_factor)
    lines = table(nodes, most=len(nodes))
    reporter.event("preflight", nodes=lines, findings=[str(finding) for finding in findings], across_s=check.across_s)
    across = "" if check.across_s is None else f", all-reduce of 4 MiB across them {1000 * check.across_s:.1f} ms"
    reporter.say("\n".join([f"preflight of {len(nodes)} nodes{across}", *(f"  {line}" for line in table(nodes))]))
    for finding in findings:
        reporter.say(f"  WARNING: {finding}")
    strict = launch.preflight is schema.NodeCheck.strict
    refused = [finding for finding in findings if finding.is_fatal or (strict and finding.is_slow)]
    if refused:
        told = "; ".join(map(str, refused))
        raise EnvError(
            f"preflight: {told}. Repair it, or leave it out (launch.slurm.exclude, launch.deepspeed.exclude); "
            "launch.preflight=skip goes on regardless."
        )


OnLost = Callable[[HostLostError, str], None]
"""Called with the error and the name of a host that does not answer any more, on a thread."""


def listen_to_nodes(
    config: schema.Config,
    env: RankEnv,
    control: dist.ProcessGroup | None,
    hosts: Sequence[str],
    reporter: Reporter,
    on_lost: OnLost,
) -> contextlib.AbstractContextManager[object]:
    """Notice while the block lasts that a node is gone, where there are several and `launch.lost_after_s` is set.

    Collective: every rank calls it; it blocks.

    Args:
        control: group of all ranks.
        hosts: of the nodes, in the order of the ranks.

    Raises:
        EnvError: nodes cannot connect to each other.
    """
    limit_s = config.launch.lost_after_s
    if len(hosts) == 1 or limit_s is None:
        return contextlib.nullcontext()

    def lost(host: str, silent_s: float) -> None:
        reporter.event("host_lost", host=host, silent_s=round(silent_s, 1))
        told = f"{host} is silent for {silent_s:.0f} s (launch.lost_after_s={limit_s:g}): its network, power or system is gone."
        fix = "Started again, the run goes on from its last checkpoint; launch.min_nodes lets it do so without that host."
        on_lost(HostLostError(f"{told} {fix}"), host)

    heartbeat = Heartbeat(limit_s=limit_s, lost=lost)
    server = Heartbeat.listen() if env.rank == 0 else None
    port: list[int] = [server.getsockname()[1] if server is not None else 0]
    dist.broadcast_object_list(port, src=0, group=control)
    try:
        if server is not None:
            heartbeat.accept(server, len(hosts) - 1)
        elif env.local_rank == 0 and env.rank:
            me = hosts[env.rank // env.local_world_size]
            heartbeat.connect(env.master_addr, port[0], me=me, host=hosts[0])
        else:
            return contextlib.nullcontext()
    except OSError as error:
        raise EnvError(
            f"launch.lost_after_s={limit_s:g}: the nodes cannot connect to {hosts[0]} ({env.master_addr}, port {port[0]}): "
            f"{error}. Let them, or turn it off with launch.lost_after_s=null."
        ) from error
    return heartbeat
