"""What a pipeline (`parallel.pp`) does not go with. A part of `rules.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from anyshard.configs.errors import Problem
from anyshard.configs.schema import Config, Device


def pipeline_rules(config: Config) -> Iterator[Problem]:
    """Why `config` cannot have stages; what depends on the model is in `parallel/stages.py`."""
    parallel, pp = config.parallel, config.parallel.pp
    if parallel.pp_layers is not None:
        yield from _layers(parallel.pp_layers, pp)
    if pp == 1:
        return
    if config.zero.stage >= 2:
        reason = f"with parallel.pp={pp} DeepSpeed shards optimizer states only (runtime/pipe/engine.py:77)."
        fix = "Use zero=z1 (or z0 in fp32); parallel.tp instead of parallel.pp goes with every stage."
        yield Problem("zero.stage", config.zero.stage, reason, fix)
    if parallel.sp > 1:
        reason = f"a pipeline of parallel.pp={pp} stages cannot split sequences as well: DeepSpeed's has no axis for it."
        yield Problem("parallel.sp", parallel.sp, reason, "Set parallel.sp=1, or parallel.pp=1; parallel.tp goes with pp.")
    if config.model.config.get("output_router_logits"):
        reason = f"the last of parallel.pp={pp} stages does not know how the others routed their tokens."
        yield Problem("model.config.output_router_logits", True, reason, "Set it to false, or parallel.pp=1.")
    if config.offload.optimizer is Device.nvme:
        reason = f"it needs ZeRO 3, which parallel.pp={pp} does not go with."
        yield Problem("offload.optimizer", "nvme", reason, "Use offload=cpu, or parallel.pp=1.")
    if config.model.config.get("output_router_logits"):
        yield balance_problem(pp)
    accumulation = _accumulation(config.deepspeed_extra)
    if accumulation not in (None, config.precision.dtype.value):
        reason = "DeepSpeed sums the gradients of shared embeddings in the type of the model (runtime/pipe/engine.py:283)."
        yield Problem("deepspeed_extra.data_types.grad_accum_dtype", accumulation, reason, "Remove it, or set parallel.pp=1.")


def balance_problem(pp: int) -> Problem:
    """The load-balancing loss of a mixture of experts is over all layers together, and a stage sees its own."""
    reason = "the loss that balances experts is over the layers of all stages together."
    fix = "Set model.config.output_router_logits=false, or parallel.pp=1; parallel.tp goes with it."
    return Problem("parallel.pp", pp, reason, fix)


def _layers(layers: list[int], pp: int) -> Iterator[Problem]:
    if len(layers) != pp:
        reason = f"it has {len(layers)} numbers for parallel.pp={pp} stages."
        yield Problem("parallel.pp_layers", layers, reason, "Give the decoder layers of each stage, or null.")
    elif min(layers) < 1:
        yield Problem("parallel.pp_layers", layers, "every stage needs a layer.", "Give each at least 1, or null.")


def _accumulation(extra: dict[str, Any]) -> Any:
    types = extra.get("data_types")
    return types.get("grad_accum_dtype") if isinstance(types, dict) else None
