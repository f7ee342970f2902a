"""What sequence parallelism cannot do, as rules. Pure; the heads of a model by path are checked once it is read."""

from __future__ import annotations

from collections.abc import Iterator

from anyshard.configs.errors import Problem
from anyshard.configs.schema import Config

ATTENTIONS = ("sdpa", "flash_attention_2", "flash_attention_3")
"""Implementations of transformers that take a mask, or positions, of the whole sequence."""


def valid_degrees(heads: int, kv_heads: int, *, tp: int = 1) -> list[int]:
    """The degrees of sp that a model with so many heads can be split into."""
    heads, kv_heads = heads // tp, max(kv_heads // tp, 1)
    return [n for n in range(1, heads + 1) if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]


def head_problem(heads: int, kv_heads: int | None, *, sp: int, tp: int, model: str) -> Problem | None:
    """Why the heads of a model cannot be divided over `sp` ranks; None when they can.

    Args:
        kv_heads: None for as many as there are heads.
        tp: ranks that have divided them before.
    """
    kv_heads = heads if kv_heads is None else kv_heads
    valid = valid_degrees(heads, kv_heads, tp=tp)
    if sp in valid:
        return None
    shared = f", of which each of tp={tp} ranks has its part" if tp > 1 else ""
    counts = f"{heads} heads and {kv_heads} key-value heads" if kv_heads != heads else f"{heads} heads"
    reason = f"the model {model} has {counts}{shared}: every rank computes whole heads."
    return Problem("parallel.sp", sp, reason, f"Set it to one of {', '.join(map(str, valid))}.")


def sequence_parallel(config: Config) -> Iterator[Problem]:
    """The rules of `parallel.sp`."""
    sp, model = config.parallel.sp, config.model
    if sp == 1:
        return
    if config.zero.hpz_partition_size > 1:
        reason = "DeepSpeed makes these groups of neighbouring ranks (utils/groups.py:925), which share their sequences."
        yield Problem("zero.hpz_partition_size", config.zero.hpz_partition_size, reason, "Set it to 1, or parallel.sp=1.")
    if model.builder != "hf":
        reason = f"model.builder={model.builder} makes a model whose attention is not transformers'."
        yield Problem("parallel.sp", sp, reason, "Set parallel.sp=1, or use model.builder=hf.")
    elif model.attention not in ATTENTIONS:
        reason = f"with parallel.sp={sp} attention needs the mask of the whole sequence, which it is not given."
        yield Problem("model.attention", model.attention, reason, f"Use one of {', '.join(ATTENTIONS)}, or parallel.sp=1.")
    known = model.config if model.path is None else {}
    heads = next((known[name] for name in ("num_attention_heads", "n_head") if isinstance(known.get(name), int)), None)
    kv_heads = known.get("num_key_value_heads")
    if heads is not None and heads % config.parallel.tp == 0:
        problem = head_problem(heads, kv_heads, sp=sp, tp=config.parallel.tp, model=str(model.name))
        if problem is not None:
            yield problem
