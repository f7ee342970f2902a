"""The stages of a pipeline in a plan: their layers, their sizes, and what one rank of each computes with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from anyshard.configs import schema
from anyshard.offload.memory import ModelShape
from anyshard.parallel.stages import Stages, division_of, plan_stages
from anyshard.trainer.models.param_table import ParamTable


def stages_of(table: ParamTable, parallel: schema.Parallel) -> Stages | None:
    """The stages of a model that `stage_problems` has nothing against; None without a pipeline."""
    division = division_of(table.model_type) if parallel.pp > 1 else None
    if division is None:
        return None
    sizes = {param.name: param.numel for param in table.params}
    return plan_stages(division, sizes, dict(table.tied), parallel, table.num_layers)


def stage_rows(stages: Stages) -> list[dict[str, Any]]:
    """Decoder layers and elements of each stage, for plan.json."""
    runs = [stages.layers(stage) for stage in range(stages.num_stages)]
    return [{"layers": [run.start, run.stop], "num_params": size} for run, size in zip(runs, stages.sizes, strict=True)]


def describe_stages(stages: Stages, accumulation_steps: int) -> str:
    """The stages for people, a line each, and for how much of a step they wait for each other."""
    lines = []
    for stage, size in enumerate(stages.sizes):
        run = stages.layers(stage)
        numbers = f"layer {run.start}" if len(run) == 1 else f"layers {run.start} to {run.stop - 1}"
        ends = [word for word, there in (("embedding", stage == 0), ("head", stage == stages.num_stages - 1)) if there]
        lines.append(f"{stage}: {', '.join([numbers, *ends])}, {size:,} parameters")
    idle = (stages.num_stages - 1) / (accumulation_steps + stages.num_stages - 1)
    lines.append(f"idle {100 * idle:.0f} % of a step, with {accumulation_steps} micro-batches")
    return "\n".join(lines)


def shapes_of(table: ParamTable, tp: int, stages: Stages | None, accumulation_steps: int) -> Iterator[ModelShape]:
    """What one rank of each stage computes with; of the whole model where there is one stage."""
    for stage in range(1 if stages is None else stages.num_stages):
        here, num_layers, is_last = list(table.params), table.num_layers, True
        if stages is not None:
            is_last = stage == stages.num_stages - 1
            copied = stages.division.shared(dict(table.tied)) if is_last else frozenset()
            here = [param for param in table.params if stages.stage_of(param.name) == stage or param.name in copied]
            # a stage has as many micro-batches under way as there are stages from it on
            num_layers = len(stages.layers(stage)) * min(stages.num_stages - stage, accumulation_steps)
        yield ModelShape(
            num_params=sum(param.local_numel(tp) for param in here if param.trainable),
            num_layers=num_layers,
            hidden_size=table.hidden_size,
            intermediate_size=table.intermediate_size * max(1, table.experts_per_token),
            vocab_size=table.vocab_size if is_last else 0,
        )
