"""One rank of a pool of `ranks.py`: joins the process group once, then runs the functions it is sent until the pipe closes.

Started as a script by path, so that it imports nothing of the test session. Wire: a connection given by file descriptor;
in come pickled `(module, path, qualname, pickled kwargs)`, out go pickled `(ok, value or traceback text)`.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import importlib.util
import os
import pickle
import random
import signal
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any


def main() -> None:
    _end_with_parent()
    channel = Connection(int(sys.argv[1]))
    stacks = Path(sys.argv[2]).open("w")  # noqa: SIM115  (faulthandler writes to it as long as the process lives)
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the test session, which ends the pools
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # tests/, as pytest has it; not tests/helpers/
    try:
        _join()
    except BaseException:
        channel.send_bytes(pickle.dumps((False, traceback.format_exc())))
        return
    channel.send_bytes(pickle.dumps((True, os.getpid())))
    while True:
        try:
            request = channel.recv_bytes()
        except (EOFError, OSError):
            break
        channel.send_bytes(_answer(request))
    os._exit(0)  # nothing to save: skip the teardown of gloo, which waits for peers


def _end_with_parent() -> None:
    """Die when the test session is killed, even inside a collective, where the closed pipe is not seen."""
    with contextlib.suppress(OSError, AttributeError):  # Linux only; elsewhere the pipe must do
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG


def _join() -> None:
    import deepspeed
    import torch

    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False, timeout=timedelta(minutes=30))


def _answer(request: bytes) -> bytes:
    module, path, qualname, arguments = pickle.loads(request)
    environment, folder = dict(os.environ), Path.cwd()
    _seed()
    try:
        function = _find(module, path, qualname)
        answer = pickle.dumps((True, function(**pickle.loads(arguments))))
    except BaseException as error:
        answer = pickle.dumps((False, traceback.format_exc()))
        error.__traceback__ = None  # frames would keep the engine alive
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    _forget_engines()
    return answer


def _find(module: str, path: str, qualname: str) -> Callable[..., Any]:
    """The function, from its module: by name where the name leads to that file, else by path (pytest's importlib mode)."""
    loaded = sys.modules.get(module)
    if loaded is None or getattr(loaded, "__file__", None) != path:
        found = None
        with contextlib.suppress(ImportError, ValueError):
            found = importlib.util.find_spec(module)
        if found is not None and found.origin == path:
            loaded = importlib.import_module(module)
        else:
            spec = importlib.util.spec_from_file_location(module, path)
            assert spec is not None
            assert spec.loader is not None
            loaded = importlib.util.module_from_spec(spec)
            parents = module.split(".")[:-1]
            for depth in range(1, len(parents) + 1):  # unpickling imports the parents first; pytest makes them up too
                sys.modules.setdefault(name := ".".join(parents[:depth]), ModuleType(name))
            sys.modules[module] = loaded  # before it runs, as import does: dataclasses and pickle look it up there
            try:
                spec.loader.exec_module(loaded)
            except BaseException:
                del sys.modules[module]
                raise
    target: Any = loaded
    for name in qualname.split("."):
        target = getattr(target, name)
    return target


def _seed() -> None:
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def _forget_engines() -> None:
    """Undo what engines leave behind in module globals, so that one of another ZeRO stage can follow in this process.

    DeepSpeed keeps its process groups in globals of `deepspeed.utils.groups` and clones the world group once; ZeRO-3
    leaves a global context and its patches of torch when an engine was built under `zero.Init` that was not left.
    """
    import torch
    import torch.distributed as dist
    from deepspeed.runtime.zero import partition_parameters
    from deepspeed.utils import groups

    gc.collect()
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(1)
    if partition_parameters.zero_init_context:
        partition_parameters.zero_init_context.clear()
        partition_parameters.shutdown_init_context()
    for name, value in vars(groups).items():
        if not name.isupper() or not name.startswith("_"):
            continue
        if isinstance(value, dict):
            value.clear()
        elif isinstance(value, (dist.ProcessGroup, list)):
            setattr(groups, name, None)
    groups.mpu = None
    world = dist.group.WORLD
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not world:
            dist.destroy_process_group(group)
    gc.collect()


if __name__ == "__main__":
    main()
