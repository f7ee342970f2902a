"""`offload=auto`: every placement planned, timed and compared; the run is frozen with the one that was chosen."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from anyshard.configs import rules, schema
from anyshard.configs.errors import ConfigError, PlanError
from anyshard.configs.world import dp_size
from anyshard.launch.env import Hardware, find_hardware
from anyshard.offload import tiers
from anyshard.offload.measured import load
from anyshard.offload.planner import Candidate, Choice, Work, choose, step_parts
from anyshard.offload.swap_space import drive_of
from anyshard.trainer.flops import peak_tflops
from anyshard.trainer.parts import parts_of

if TYPE_CHECKING:
    from anyshard.launch.plan import Plan

PLACEMENTS: dict[str, tuple[str, str]] = {
    "none": ("none", "none"),
    "cpu": ("cpu", "none"),
    "cpu_param": ("cpu", "cpu"),
    "nvme": ("nvme", "none"),
    "nvme_param": ("nvme", "nvme"),
}
"""Choices of `offload=`, in the order of what they move."""
UTILIZATION = 0.4
"""Share of the peak rate that training reaches; all candidates compute the same."""
CORE_FLOPS = 30e9
"""Of one processor core, where no other rate is known."""


def settle(config: schema.Config, plan: Callable[[schema.Config], Plan]) -> tuple[schema.Config, Choice]:
    """The configuration with the placement that is fastest among those that fit.

    Args:
        plan: `plan` of `launch/plan.py`.

    Raises:
        PlanError: nothing fits; with every candidate and why it does not.
    """
    hardware = find_hardware()
    found = [_candidate(config, name, hardware, plan) for name in PLACEMENTS]
    choice = choose([candidate for candidate, _ in found], _limits(config, [planned for _, planned in found if planned]))
    if choice.best is None:
        lines = "\n  ".join(choice.lines())
        raise PlanError(
            f"offload=auto: no placement fits the memory of one rank.\n  {lines}\nUse more ranks, or a smaller model."
        )
    return _placed(config, choice.best.name), choice


def _placed(config: schema.Config, name: str) -> schema.Config:
    placed = copy.deepcopy(config)
    optimizer, param = PLACEMENTS[name]
    placed.offload.auto = False
    placed.offload.optimizer, placed.offload.param = schema.Device(optimizer), schema.Device(param)
    return placed


def _candidate(
    config: schema.Config, name: str, hardware: Hardware, plan: Callable[[schema.Config], Plan]
) -> tuple[Candidate, Plan | None]:
    placed = _placed(config, name)
    problems = [*rules.check(placed), *tiers.lacks(placed)]
    try:
        if problems:
            raise ConfigError(problems[:1])
        planned = plan(placed)
    except ConfigError as error:
        return Candidate(name, *PLACEMENTS[name], needs={}, refusal=str(error)), None
    memory = planned.memory
    needs = {"device": float(memory.device_bytes), "host": float(memory.host_bytes), "drive": float(memory.nvme_bytes)}
    if not hardware.num_gpus and config.cluster.device_memory_gib is None:
        needs = {"host": needs["device"] + needs["host"], "drive": needs["drive"]}
    rates = load(Path(drive_of(config.offload.nvme_path or ".", 0)))
    optimizer, param = PLACEMENTS[name]
    work = _work(planned, hardware)
    timed = step_parts(work, rates, optimizer=optimizer, param=param, overlap=config.offload.overlap)
    return Candidate(name, *PLACEMENTS[name], needs=needs, parts=timed), planned


def _work(planned: Plan, hardware: Hardware) -> Work:
    config, batch = planned.config, planned.batch
    dp = dp_size(config)
    assert dp is not None, "planned configurations have their ranks"
    parts = parts_of(config, planned.table, dp if config.zero.stage >= 3 else 1)
    elements = sum(map(sum, parts.groups)) // (dp if config.zero.stage in (1, 2) else 1)
    name, ranks = hardware.gpu_name, int(config.launch.procs_per_node)
    tflops = config.cluster.peak_tflops or (peak_tflops(name, config.precision.dtype.value) if name else None)
    flops = tflops * 1e12 if tflops else CORE_FLOPS * max(1, hardware.num_cores // ranks)
    tokens = batch.micro_batch_size * batch.accumulation_steps * config.data.sequence_length
    drives = len([path for path in (config.offload.nvme_path or "").split(",") if path.strip()]) or 1
    return Work(
        compute_s=planned.flops_per_token * tokens / config.parallel.tp / (UTILIZATION * flops),
        elements=elements,
        part_bytes=sum(parts.names.values()) * parts.element_bytes,
        micro_steps=batch.accumulation_steps,
        num_states=parts.num_states,
        ranks_per_drive=-(-ranks // drives),
    )


def _limits(config: schema.Config, plans: list[Plan]) -> dict[str, float]:
    limits = {"device": plans[0].device_limit_bytes, "host": plans[0].host_limit_bytes} if plans else {}
    if config.offload.nvme_path:
        drive = Path(drive_of(config.offload.nvme_path, 0)).absolute()
        there = next(folder for folder in (drive, *drive.parents) if folder.exists())
        limits["drive"] = shutil.disk_usage(there).free / int(config.launch.procs_per_node)
    return limits
