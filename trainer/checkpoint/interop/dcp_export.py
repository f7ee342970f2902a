"""A checkpoint as a folder of `torch.distributed.checkpoint`, under the names that its `get_state_dict` gives."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.state_dict_saver import save

from anyshard.trainer.checkpoint.interop.output import new_folder
from anyshard.trainer.checkpoint.interop.source import Key, Stored, num_bytes
from anyshard.trainer.checkpoint.manifest import BUFFER, PARAM
from anyshard.trainer.checkpoint.partitions import PREFIX


class _Planner(DefaultSavePlanner):
    """Plans with tensors on the meta device, and reads each when it is written."""

    def __init__(self, read: Callable[[str], torch.Tensor | None]) -> None:
        super().__init__()
        self._read = read

    def lookup_object(self, index: MetadataIndex) -> Any:
        whole = self._read(index.fqn)
        return super().lookup_object(index) if whole is None else whole


@contextlib.contextmanager
def _own_errors() -> Iterator[None]:
    """DCP wraps every error in one of its own, which is not even an Exception."""
    try:
        yield
    except CheckpointException as error:
        cause = next((cause for cause, _ in error.failures.values()), error)
        raise cause from None


def export_dcp(source: Stored, out: Path, *, report: Callable[[int, int], None]) -> dict[str, Any]:
    """Write {"model": {name: tensor}, "optim": {"state": {name: {key: tensor}}}}; memory: about one tensor.

    Raises:
        CheckpointError: the checkpoint is damaged.
        ConfigError: `out` is occupied.
    """
    flat: dict[str, Key] = {}
    content: dict[str, Any] = {"model": {}, "optim": {"state": {}}}
    bound = {name for name, _ in source.tensors if name.startswith(PREFIX)}
    for (name, key), tensor in source.tensors.items():
        if name in bound:
            continue
        empty = torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype), device="meta")
        if key in (PARAM, BUFFER):
            content["model"][name] = empty
            flat[f"model.{name}"] = (name, key)
        else:
            content["optim"]["state"].setdefault(name, {})[key] = empty
            flat[f"optim.state.{name}.{key}"] = (name, key)
    for scalar in source.record.scalars:
        for name in scalar.names:
            if name.startswith(PREFIX):
                continue
            content["optim"]["state"].setdefault(name, {})[scalar.key] = torch.tensor(float(scalar.value))
    total, done = num_bytes({key: source.tensors[key] for key in flat.values()}), 0

    def read(fqn: str) -> torch.Tensor | None:
        nonlocal done
        if fqn not in flat:
            return None
        key = flat[fqn]
        done += num_bytes({key: source.tensors[key]})
        report(done, total)
        return source.read(key)

    with new_folder(out) as folder:
        with _own_errors():
            save(content, storage_writer=FileSystemWriter(folder), planner=_Planner(read), no_dist=True)
        for path in folder.iterdir():  # DCP syncs .metadata before its last bytes are written
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    notes = [f"{other} is stored as {name}, which it is tied to" for other, name in source.record.tied.items()]
    if bound:
        notes.append(
            f"the optimizer's states of {len(bound)} partitions are left out: only the layout that wrote them can read them"
        )
    return {"out": str(out), "step": source.record.step, "tensors": len(flat), "notes": notes}
