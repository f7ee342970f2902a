"""A rank's swap files from the claimed folder to the running engine: settings, reservation, and what DeepSpeed needs mended."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from anyshard.configs import schema
from anyshard.configs.errors import AnyshardError, EnvError
from anyshard.offload import tiers
from anyshard.offload.derive import Aio
from anyshard.offload.swap_space import SwapSpace, drive_of
from anyshard.parallel.groups import Groups
from anyshard.parallel.rank_env import RankEnv
from anyshard.trainer.models.param_table import ParamTable
from anyshard.trainer.optim.states import STATES
from anyshard.trainer.parts import parts_of


class Swapping:
    """What a run with state on NVMe does beside the others.

    Args:
        ds_config: the configuration that the model and the engine will be built with; `plan` completes it.
        space: this rank's folder.
    """

    def __init__(self, config: schema.Config, ds_config: dict[str, Any], space: SwapSpace, groups: Groups, aio: Aio) -> None:
        self._config, self._ds_config, self._space, self._groups, self._aio = config, ds_config, space, groups, aio

    def plan(self, table: ParamTable) -> tiers.TierBytes:
        """Complete DeepSpeed's configuration with what follows from the model; returns what this rank's state takes.

        Raises:
            ConfigError: the settings cannot hold the model's parts.
        """
        parts = parts_of(self._config, table, self._groups.mesh.dp)
        fragment = tiers.fragment(self._config, parts, folder=str(self._space.folder), aio=self._aio)
        tiers.complete(self._ds_config, fragment, self._config.deepspeed_extra)
        return fragment.bytes

    def reserve(self, model: nn.Module, groups: Sequence[Iterable[Any]]) -> None:
        """Before the engine is built: see that parameters were written, and give the optimizer's files their space.

        Raises:
            EnvError: the drive has too little space.
        """
        from anyshard.offload import mending

        if self._config.offload.param is schema.Device.nvme:
            self._space.require_whole(mending.param_files(model.parameters()))
        if self._config.offload.optimizer is schema.Device.nvme:
            optimizer = self._config.optimizer
            known = STATES.get(optimizer.name, ()) if optimizer.name != "sgd" or optimizer.momentum else ()
            files = mending.optimizer_files(
                [list(group) for group in groups],
                known,
                folder=Path(self._space.folder),
                rank=dist.get_rank(),
                sub_group_elements=self._ds_config["zero_optimization"]["sub_group_size"],
                threads=self._ds_config["aio"]["intra_op_parallelism"],
            )
            self._space.reserve(files)

    def describe(self) -> dict[str, Any]:
        """What is where, for the record."""
        return {"folder": str(self._space.folder), "nvme_bytes": self._space.used_bytes(), "removed": len(self._space.removed)}

    def mend(self, ds_engine: Any) -> None:
        """After the engine is built, before its first step."""
        from anyshard.offload.mending import mend

        mend(ds_engine.optimizer)

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Turn what DeepSpeed raises where the drive fails, an AssertionError without text, into what happened to it.

        Raises:
            EnvError: the drive is gone, or does not take writes any more.
        """
        try:
            yield
        except AnyshardError:
            raise
        except Exception as error:
            trouble = self._space.trouble()
            if trouble is None:
                raise
            raise EnvError(f"{trouble}, and start the run again: it goes on from its last checkpoint.") from error


def claim_space(config: schema.Config, run_dir: Path, env: RankEnv) -> contextlib.AbstractContextManager[SwapSpace | None]:
    """This rank's folder on its drive; nothing where nothing is swapped.

    Raises:
        EnvError: it cannot be had.
    """
    if not tiers.uses_nvme(config):
        return contextlib.nullcontext()
    assert config.offload.nvme_path is not None, "the rules ask for it"
    return SwapSpace.claim(drive_of(config.offload.nvme_path, env.local_rank), run=run_dir, rank=env.rank)
