"""Functions run on several ranks: `run_ranks(fn, world_size, **kwargs) -> [value of rank 0, value of rank 1, ...]`.

    from helpers.ranks import run_ranks

    def _sum(value):                       # module level; imports torch and deepspeed inside or at the top, as it likes
        import torch, torch.distributed as dist
        tensor = torch.tensor([value + dist.get_rank()])
        dist.all_reduce(tensor)
        return tensor.item()               # anything that pickles

    @pytest.mark.dist
    def test_sum():
        assert run_ranks(_sum, 2, value=1) == [3, 3]

The function runs with the gloo process group up (`deepspeed.init_distributed` was called; RANK, LOCAL_RANK, WORLD_SIZE,
LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set), one thread, and the seeds of random, numpy and torch at 0.

The ranks are processes that stay alive: one pool per world size, started at its first use (some seconds for the imports)
and shared by all tests of a session. After each call the worker restores its environment variables and folder, collects
garbage and forgets DeepSpeed's global groups, so engines of different ZeRO stages can follow each other. Patches a
function leaves on modules are not undone: pass `fresh=True` to run in new processes that end with the call.

A rank that raises fails the call with a `RanksError` holding the traceback of every failed rank, the stack of every rank
that was still running (they mostly wait in a collective for the failed one) and the end of each rank's output. So does
a call that takes longer than `timeout_s`. The pool is then killed, each rank with its children, and a later call starts
a new one. Pools end with the test session, however it ends: a worker leaves when its pipe closes.

Under pytest-xdist each xdist worker has pools of its own (about 0.4 GiB a rank): run multi-rank tests in one process.
"""

from __future__ import annotations

import atexit
import contextlib
import inspect
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

MAX_LIVE_RANKS = 8
"""Pools used longest ago are closed above this many processes: memory is shared with everything else on the machine."""
START_TIMEOUT_S = 180.0
GRACE_S = 5.0
"""How long the other ranks may take to end by themselves once one has failed."""
TAIL_LINES = 25


class RanksError(AssertionError):
    """A function failed on some rank, or did not end in time; the message holds what every rank was doing."""


def rank_env(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Environment of one rank on the CPU, as the launcher would set it."""
    scripts = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions")),
        "PATH": os.pathsep.join([scripts, os.environ.get("PATH", "")]),  # ninja is there
        "OMP_NUM_THREADS": "1",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def free_port() -> int:
    """A TCP port of the loopback address that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class _Rank:
    """One worker process and the pipe to it."""

    def __init__(self, rank: int, world_size: int, port: int, folder: Path) -> None:
        self.rank = rank
        self.log = folder / f"rank{rank}.log"
        self.stacks = folder / f"rank{rank}.stacks"
        self.channel: Connection
        self.channel, child = Pipe()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("rank_worker.py")), str(child.fileno()), str(self.stacks)],
                env=rank_env(rank, world_size, port),
                pass_fds=[child.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a process group of its own, so that it can be killed with its children
            )
        child.close()

    def receive(self) -> tuple[bool, Any]:
        try:
            answer: tuple[bool, Any] = pickle.loads(self.channel.recv_bytes())
        except (EOFError, OSError):
            return False, f"the process died with exit code {self.process.wait()}"
        return answer

    def stack(self) -> str:
        """What a rank that is still running does now: the stack of each of its threads."""
        self.process.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline and not self.stacks.stat().st_size:
            time.sleep(0.02)
        time.sleep(0.05)
        return "still running:\n" + self.stacks.read_text()

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-TAIL_LINES:])

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.channel.close()


class _Pool:
    """All ranks of one world size."""

    def __init__(self, world_size: int) -> None:
        self.used_at = time.monotonic()
        self.folder = Path(tempfile.mkdtemp(prefix="anyshard-ranks-"))
        port = free_port()
        self.ranks = [_Rank(rank, world_size, port, self.folder) for rank in range(world_size)]
        self.collect(START_TIMEOUT_S, "start of the ranks")

    def call(self, function: Callable[..., Any], kwargs: dict[str, Any], timeout_s: float) -> list[Any]:
        path = inspect.getsourcefile(function)
        assert path is not None
        request = pickle.dumps((function.__module__, os.path.abspath(path), function.__qualname__, pickle.dumps(kwargs)))
        for rank in self.ranks:
            with contextlib.suppress(OSError):  # a rank that died since is reported by receive()
                rank.channel.send_bytes(request)
        return self.collect(timeout_s, function.__qualname__)

    def collect(self, timeout_s: float, what: str) -> list[Any]:
        answers: dict[int, tuple[bool, Any]] = {}
        start = time.monotonic()
        deadline, failed = start + timeout_s, False
        while len(answers) < len(self.ranks):
            waiting = {rank.channel: rank for rank in self.ranks if rank.rank not in answers}
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for channel in ready:
                rank = waiting[channel]  # type: ignore[index]
                answers[rank.rank] = rank.receive()
            if not failed and not all(ok for ok, _ in answers.values()):
                failed, deadline = True, min(deadline, time.monotonic() + GRACE_S)
        if failed or len(answers) < len(self.ranks):
            reason = "failed" if failed else f"did not end within {timeout_s:g} s"
            report = self._report(f"{what} {reason} on {len(self.ranks)} rank(s)", answers)
            self.close()
            raise RanksError(report)
        self.used_at = time.monotonic()
        return [answers[rank.rank][1] for rank in self.ranks]

    def _report(self, title: str, answers: dict[int, tuple[bool, Any]]) -> str:
        parts = [title]
        for rank in self.ranks:
            ok, value = answers.get(rank.rank, (None, None))
            text = "returned" if ok else rank.stack() if ok is None else str(value)
            parts.append(f"---- rank {rank.rank}: {text.rstrip()}")
            if not ok and rank.tail():
                parts.append(f"  -- end of its output:\n{rank.tail()}")
        return "\n".join(parts)

    def close(self) -> None:
        for rank in self.ranks:
            rank.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
        for size, pool in list(_POOLS.items()):
            if pool is self:
                del _POOLS[size]


_POOLS: dict[int, _Pool] = {}


def run_ranks(
    fn: Callable[..., Any], world_size: int, *, timeout_s: float = 120, fresh: bool = False, **kwargs: Any
) -> list[Any]:
    """Call `fn(**kwargs)` on every rank of a process group of `world_size` and return the values by rank.

    Args:
        fn: a function at module level; its module is imported by the workers, by path where it is a test's.
        world_size: number of ranks, each a process.
        timeout_s: of this call; the start of a pool is not counted.
        fresh: use new processes that end with the call.
        kwargs: arguments of `fn`, the same for all ranks; they must pickle.

    Raises:
        RanksError: a rank raised, died, or did not end in time.
    """
    if "<" in fn.__qualname__:
        raise TypeError(f"{fn.__qualname__} is not at module level: other processes cannot import it")
    if fresh:
        pool = _Pool(world_size)
        try:
            return pool.call(fn, kwargs, timeout_s)
        finally:
            pool.close()
    if world_size not in _POOLS:
        _make_room(world_size)
        _POOLS[world_size] = _Pool(world_size)
    return _POOLS[world_size].call(fn, kwargs, timeout_s)


def _make_room(num_ranks: int) -> None:
    while _POOLS and sum(len(pool.ranks) for pool in _POOLS.values()) + num_ranks > MAX_LIVE_RANKS:
        min(_POOLS.values(), key=lambda pool: pool.used_at).close()


@atexit.register
def close_pools() -> None:
    """End all pools of this process."""
    for pool in list(_POOLS.values()):
        pool.close()
