"""Looking at all nodes before the first step: what they run, how fast they compute, whether and how fast they reach each other.

Reports go through the rendezvous store, which every rank has reached already: a link between two nodes that is broken
cannot keep the report of it back.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from anyshard.configs.errors import EnvError
from anyshard.parallel.nodes import Finding, Node, compare, node_of, rounds, watched
from anyshard.parallel.rank_env import RankEnv, host_name

PACKAGES = ("anyshard", "torch", "deepspeed", "transformers", "numpy")
MAX_ROUNDS = 4
"""Partners that each node exchanges data with: enough to tell a slow node from a slow partner, on any number of nodes."""
MESSAGE_BYTES = 4 * 2**20
REPEATS = 3


class Preflight:
    """The check of all nodes of a run.

    Args:
        device: of this rank.
        timeout_s: how long a node may take for any part of it.
        tag: names this check in the store; another one for each start of the ranks.
        host: of this rank.

    Attributes:
        across_s: time of an all-reduce of 4 MiB over all ranks.
    """

    def __init__(self, env: RankEnv, device: torch.device, *, timeout_s: float, tag: str, host: str | None = None) -> None:
        self._env, self._device, self._timeout_s = env, device, timeout_s
        self.across_s: float | None = None
        self._host = host or host_name(os.environ)
        self._store = PrefixStore(f"anyshard-preflight-{tag}", _get_default_store())
        self._size, self._per_node = env.world_size // env.local_world_size, env.local_world_size
        self._node = env.rank // self._per_node

    def run(self, *, slow_factor: float) -> tuple[list[Node], list[Finding]]:
        """Look at all nodes; the same result on every rank. Where all can be used, `across_s` is set.

        Collective: every rank calls it; it blocks.

        Raises:
            EnvError: a node does not answer.
        """
        self._meet("begin")
        node = self._describe()
        inside = self._group_of_node()
        node = replace(node, compute_s=self._timed(self._computation()))
        if inside is not None:
            tensor = torch.zeros(MESSAGE_BYTES // 4, device=self._device)
            node = replace(node, inside_s=self._timed(lambda: dist.all_reduce(tensor, group=inside)))
        self._meet("alone")
        links = {}
        for number, pairs in enumerate(rounds(self._size, MAX_ROUNDS)):
            partner = next((b if a == self._node else a for a, b in pairs if self._node in (a, b)), None)
            if partner is not None and self._env.local_rank == 0:
                links[partner] = self._exchange(partner)
            self._meet(f"round-{number}")
        nodes, findings = self._agree(replace(node, links_s=links), slow_factor)
        if not any(finding.is_fatal for finding in findings):
            tensor = torch.zeros(MESSAGE_BYTES // 4, device=self._device)
            self.across_s = self._timed(lambda: dist.all_reduce(tensor))
        return nodes, findings

    def _describe(self) -> Node:
        return Node(self._host, _versions(), _devices(self._device, self._per_node), watched(os.environ), clock_s=time.time())

    def _group_of_node(self) -> dist.ProcessGroup | None:
        if self._per_node == 1:
            return None
        mine = None
        for first in range(0, self._env.world_size, self._per_node):
            group = dist.new_group(list(range(first, first + self._per_node)))
            mine = group if first == self._node * self._per_node else mine
        return mine

    def _computation(self) -> Callable[[], object]:
        size, dtype = (4096, torch.bfloat16) if self._device.type == "cuda" else (256, torch.float32)
        matrix = torch.ones(size, size, device=self._device, dtype=dtype)
        return lambda: torch.mm(matrix, matrix)

    def _timed(self, work: Callable[[], object]) -> float:
        """Seconds of the fastest of some repetitions."""
        work()
        times = []
        for _ in range(REPEATS):
            self._synchronize()
            begun = time.perf_counter()
            work()
            self._synchronize()
            times.append(time.perf_counter() - begun)
        return min(times)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _exchange(self, partner: int) -> float:
        """Send and receive a message; infinite where it fails or takes longer than the timeout."""
        there = partner * self._per_node
        outwards = torch.zeros(MESSAGE_BYTES // 4, device=self._device)
        inwards = torch.empty_like(outwards)

        # one after the other, so that NCCL has an order for the pair, and with a limit to each, which gloo keeps
        calls = [(dist.isend, outwards), (dist.irecv, inwards)]
        limit = datetime.timedelta(seconds=self._timeout_s)

        def both() -> None:
            for call, tensor in calls if self._node < partner else reversed(calls):
                work = call(tensor, there)
                assert work is not None
                work.wait(limit)

        try:
            return self._timed(both)
        except RuntimeError:  # what gloo and NCCL raise for a peer that is gone or silent
            return math.inf

    def _meet(self, stage: str) -> None:
        """Wait for all ranks.

        Raises:
            EnvError: names the hosts that did not come.
        """
        self._store.set(f"{stage}-{self._env.rank}", self._host)
        self._hosts_of(stage)

    def _hosts_of(self, stage: str) -> list[str]:
        hosts, ends = {}, time.monotonic() + self._timeout_s
        for rank in range(self._env.world_size):
            with contextlib.suppress(dist.DistStoreError):
                self._wait(f"{stage}-{rank}", ends)
                hosts[rank] = self._store.get(f"{stage}-{rank}").decode()
        missing = [rank for rank in range(self._env.world_size) if rank not in hosts]
        if missing:
            raise EnvError(
                f"preflight: {self._names(missing)} did not answer within {self._timeout_s:g} s. Look at it, "
                "leave it out (launch.slurm.exclude, launch.deepspeed.exclude), or raise launch.preflight_timeout_s."
            )
        return [hosts[rank] for rank in range(self._env.world_size)]

    def _names(self, ranks: list[int]) -> str:
        """Hosts of ranks, as far as they have said who they are."""
        known = {}
        for rank in ranks:
            with contextlib.suppress(dist.DistStoreError):
                self._wait(f"begin-{rank}", time.monotonic() + 0.1)
                known[rank] = self._store.get(f"begin-{rank}").decode()
        return ", ".join(f"{known.get(rank, 'an unknown host')} (rank {rank})" for rank in ranks)

    def _wait(self, key: str, ends_s: float) -> None:
        left_s = max(ends_s - time.monotonic(), 0.05)
        self._store.wait([key], datetime.timedelta(seconds=left_s))

    def _agree(self, node: Node, slow_factor: float) -> tuple[list[Node], list[Finding]]:
        self._store.set(f"report-{self._env.rank}", json.dumps(asdict(node)))
        reports = [node_of(json.loads(text)) for text in self._hosts_of("report")]
        nodes = []
        for first in range(0, len(reports), self._per_node):
            ranks = reports[first : first + self._per_node]
            nodes.append(replace(ranks[0], compute_s=max(rank.compute_s for rank in ranks)))
        if len({each.host for each in nodes}) < len(nodes):  # containers may all have one name
            nodes = [replace(each, host=f"{each.host} (node {number})") for number, each in enumerate(nodes)]
        return nodes, compare(nodes, slow_factor=slow_factor)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    if torch.cuda.is_available():
        found["CUDA"] = str(torch.version.cuda)
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return found


def _devices(device: torch.device, per_node: int) -> str:
    if device.type != "cuda":
        return "CPU"
    import pynvml

    name = torch.cuda.get_device_name(device)
    try:
        pynvml.nvmlInit()
        driver = f", driver {pynvml.nvmlSystemGetDriverVersion()}"
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        driver += f", at most {pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM)} MHz"
    except pynvml.NVMLError:
        driver = ""
    return f"{per_node} x {name}{driver}"
