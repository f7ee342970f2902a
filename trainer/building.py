"""Models as a run wants them: in its type, divided into stages, split over tensor-parallel ranks, partitioned under ZeRO-3."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from anyshard.configs import schema
from anyshard.configs.errors import ConfigError, Problem
from anyshard.configs.registry import lookup
from anyshard.parallel.groups import Groups
from anyshard.trainer.models.table import table_of
from anyshard.trainer.swapping import Swapping
from anyshard.trainer.task import Batch, Task


def model_builder(
    config: schema.Config,
    ds_config: dict[str, Any],
    device: torch.device,
    groups: Groups,
    say: Callable[[str], None],
    swapping: Swapping | None = None,
) -> Callable[[], torch.nn.Module]:
    """Makes the model of `config` on this rank.

    Collective: every rank calls what it returns.
    """
    build = lookup("model", config.model.builder, key="model.builder")
    dtype, partitioner = torch_dtype(config), _partitioner(ds_config, config, groups)

    def partition() -> Any:
        if swapping is not None:
            swapping.plan(table_of(build(config, device=torch.device("meta"), dtype=torch.float32, partition=None, say=say)))
        return partitioner()

    def whole() -> torch.nn.Module:
        made: torch.nn.Module = build(config, device=device, dtype=dtype, partition=partition(), say=say)
        return made

    def in_parts() -> torch.nn.Module:
        if config.model.builder == "hf":
            made: torch.nn.Module = build(config, device=device, dtype=dtype, partition=partition(), groups=groups, say=say)
            return made
        return _split(build(config, device=device, dtype=dtype, partition=None, say=say), config, groups, partition())

    if groups.pp is not None:
        return lambda: _stage(config, device, dtype, groups, say)
    return whole if groups.tp is None and groups.sp is None else in_parts


def _stage(
    config: schema.Config, device: torch.device, dtype: torch.dtype, groups: Groups, say: Callable[[str], None]
) -> torch.nn.Module:
    """This rank's stage of the model of `config`. Collective: every rank calls it."""
    if config.model.builder == "hf":
        from anyshard.trainer.models.hf import build_stage

        return build_stage(config, device=device, dtype=dtype, groups=groups, say=say)
    build = lookup("model", config.model.builder, key="model.builder")
    return stage_of(build(config, device=device, dtype=dtype, partition=None, say=say), config, groups)


def stage_of(module: torch.nn.Module, config: schema.Config, groups: Groups) -> torch.nn.Module:
    """This rank's stage of a finished model, split over its tensor-parallel ranks. Collective: every rank calls it."""
    from anyshard.parallel.pipeline import Pipeline, divide, keep_stage

    stages = divide(module, config.parallel, config.model.name)
    sharder = None
    if groups.tp is not None:
        from anyshard.parallel.tensor import Sharder

        sharder = Sharder(module, groups, config.model.name)
    whole = keep_stage(module, stages, groups.pp_rank)
    if sharder is not None:
        sharder.restrict()
        sharder.shard_all()
    return Pipeline(module, stages, whole, groups)


def _split(module: torch.nn.Module, config: schema.Config, groups: Groups, partition: Any) -> torch.nn.Module:
    """A finished model, split over the ranks: by pipeline and tensor parallelism, and under ZeRO-3 partitioned."""
    if groups.pp is not None:
        return stage_of(module, config, groups)
    if groups.tp is not None:
        from anyshard.parallel.tensor import Sharder

        Sharder(module, groups, config.model.name).shard_all()
    if partition is not None:
        partition(list(module.parameters()))
    return module


def _partitioner(ds_config: dict[str, Any], config: schema.Config, groups: Groups) -> Callable[[], Any]:
    """Makes what partitions parameters under ZeRO-3; makes None at other stages."""

    def make() -> Any:
        if config.zero.stage != 3:
            return None
        from anyshard.parallel.zero3 import Zero3Partitioner

        return Zero3Partitioner(ds_config, torch_dtype(config), groups)

    return make


def fitted(
    task: Task, ds_config: dict[str, Any], config: schema.Config, groups: Groups, swapping: Swapping | None = None
) -> Task:
    """A user's task in the type of the run: its batches cast, and under ZeRO-3 its parameters partitioned once built."""
    dtype, partition = torch_dtype(config), _partitioner(ds_config, config, groups)

    def build() -> torch.nn.Module:
        module = task.model().to(dtype)
        if swapping is not None:
            swapping.plan(table_of(module))
        return _split(module, config, groups, partition())

    def collate(samples: list[Any]) -> Batch:
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in task.collate(samples).items()}

    return dataclasses.replace(task, model=build, collate=collate)


def require_whole_sequences(config: schema.Config) -> None:
    """Refuse sequence parallelism for a task of the user's own: only its author knows what to cut.

    Raises:
        ConfigError: it is asked for.
    """
    if config.parallel.sp > 1:
        reason = "the model and the loss are your own, and nothing says how to cut their sequences."
        fix = f"Set parallel.sp=1 and parallel.dp or parallel.tp={config.parallel.sp}."
        raise ConfigError(Problem("parallel.sp", config.parallel.sp, reason, fix))


def torch_dtype(config: schema.Config) -> torch.dtype:
    """`precision.dtype` as torch calls it."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[config.precision.dtype.value]
