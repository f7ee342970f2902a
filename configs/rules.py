"""Everything that must hold between the keys of a configuration, beyond their types. Pure; all problems are reported together.

Each rule is a generator of problems; `RULES` lists them. A rule that needs the number of ranks is silent until it is
known (`world.resolve_ranks`), so that the same check serves before and after. What depends on this machine (devices,
files) is checked where it is used.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from anyshard.configs import deepspeed_keys, registry
from anyshard.configs.batch import batch_problem
from anyshard.configs.errors import ConfigError, Problem
from anyshard.configs.keys import all_keys, flatten
from anyshard.configs.rules_pipeline import pipeline_rules
from anyshard.configs.schema import Config, Device, Dtype, Init
from anyshard.configs.sequence_rules import sequence_parallel
from anyshard.configs.world import dp_size, model_parallel_size, world_size

BYTE_VOCABULARY = 257
"""Ids of data.tokenizer=bytes: 256 bytes and the end of a document (trainer/data/tokenizers.py)."""

_POSITION_FIELDS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
_TRACKERS = ("jsonl", "wandb")
_SWAPPED_OPTIMIZERS = ("adamw", "lion", "sgd")
_OVERLAPS = ("none", "read", "write", "both")


def check(config: Config) -> list[Problem]:
    """Everything wrong with the configuration; empty when it can be used."""
    bounds = list(_bounds(config))
    if any(problem.key in _PREREQUISITES for problem in bounds):
        return bounds  # the other rules would divide by what is out of range
    return bounds + [problem for rule in RULES for problem in rule(config)]


Sources = Callable[[], dict[str, str]]
"""Gives what set each key (`Composition.sources`), which is looked up only when something is wrong."""


def require(config: Config, sources: Sources = dict) -> None:
    """Refuse a configuration that cannot be used.

    Args:
        sources: names the file to blame.

    Raises:
        ConfigError: with every problem.
    """
    problems = check(config)
    if problems:
        raise ConfigError(with_sources(problems, sources()))


def with_sources(problems: Sequence[Problem], sources: dict[str, str]) -> list[Problem]:
    """The problems, each with the file that set its key; what the command line set needs no telling."""
    result = []
    for problem in problems:
        source = next((sources[key] for key in _upwards(problem.key) if key in sources), "override")
        told = source.startswith("override")
        result.append(
            problem if told else Problem(problem.key, problem.value, problem.reason, f"{problem.fix} (Set in {source}.)")
        )
    return result


def _upwards(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]


_PREREQUISITES = frozenset(
    {
        *(f"parallel.{axis}" for axis in ("dp", "tp", "pp", "sp")),
        *("launch.nodes", "launch.procs_per_node", "zero.hpz_partition_size"),
        *("train.global_batch_size", "train.micro_batch_size", "train.max_steps", "zero.stage"),
        *("schedule.warmup_steps", "schedule.decay_steps"),
    }
)
"""Keys that other rules compute with."""


def _bounds(config: Config) -> Iterator[Problem]:
    values = flatten(config)
    for path, key in all_keys().items():
        value = values.get(path)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        low = key.ge is None or value >= key.ge
        above = key.gt is None or value > key.gt
        high = key.le is None or value <= key.le
        if not (low and above and high) or math.isinf(value) or math.isnan(value):
            unit = f" ({key.unit})" if key.unit else ""
            yield Problem(
                path, value, "it is out of range.", f"Give: {key.type_text} {key.range_text or 'that is finite'}{unit}."
            )
    for path in ("parallel.dp", "launch.procs_per_node"):
        value = values[path]
        if isinstance(value, str) and value != "auto":
            yield Problem(path, value, "it is neither a number nor auto.", "Give a positive integer or auto.")


def _names(config: Config) -> Iterator[Problem]:
    chosen = [
        ("data", config.data.source, "data.source"),
        ("model", config.model.builder, "model.builder"),
        ("optimizer", config.optimizer.name, "optimizer.name"),
        ("schedule", config.schedule.name, "schedule.name"),
        ("launch", config.launch.name, "launch.name"),
        *(("callback", name, f"callbacks.{name}") for name in config.callbacks),
    ]
    for kind, name, key in chosen:
        if name not in registry.names(kind):
            yield registry.unknown_name(kind, name, key=key)
    for name, options in config.callbacks.items():
        if options is not None and not isinstance(options, dict):
            fix = f"Write callbacks.{name}={{}} to turn it on, callbacks.{name}=null to turn it off."
            yield Problem(f"callbacks.{name}", options, "it holds the options of a callback, a mapping.", fix)
    if config.tracking.name not in _TRACKERS:
        near = difflib.get_close_matches(config.tracking.name, _TRACKERS, n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        yield Problem(
            "tracking.name", config.tracking.name, "there is no such tracker.", f"{hint}There are: {', '.join(_TRACKERS)}."
        )


def _run_name(config: Config) -> Iterator[Problem]:
    name = config.run.name
    if name is not None and not re.fullmatch(r"[\w.][\w.+=@-]*", name):
        fix = "Use letters, digits and . _ - + = @ only; run.dir takes any path."
        yield Problem("run.name", name, "it cannot be the name of a folder.", fix)


def _available(config: Config) -> Iterator[Problem]:
    if config.parallel.ep > 1:
        reason = (
            "DeepSpeed 0.19.8's AutoEP crashes with the mixtures of experts of transformers 5.23 "
            "(module_inject/auto_ep_presets/base.py:326)."
        )
        fix = "Set parallel.ep=1; zero=z3 shards the experts over parallel.dp."
        yield Problem("parallel.ep", config.parallel.ep, reason, fix)


def _order(config: Config) -> Iterator[Problem]:
    order, axes = config.parallel.order, ["tp", "sp", "pp", "dp"]
    if sorted(order) != sorted(axes):
        reason = "every axis must be in it once."
        yield Problem("parallel.order", order, reason, f"Give tp, sp, pp and dp in some order, such as [{','.join(axes)}].")


def _world(config: Config) -> Iterator[Problem]:
    world, parallel = world_size(config), config.parallel
    if world is None:
        return
    model_parallel = model_parallel_size(config)
    ranks = f"launch.nodes * launch.procs_per_node = {config.launch.nodes} * {config.launch.procs_per_node} = {world}"
    if isinstance(parallel.dp, int) and parallel.dp * model_parallel != world:
        degrees = f"dp * tp * pp * sp = {parallel.dp} * {parallel.tp} * {parallel.pp} * {parallel.sp}"
        reason = f"{degrees} = {parallel.dp * model_parallel}, but there are {world} ranks ({ranks})."
        fix = f"Set parallel.dp={world // model_parallel} or auto" if world % model_parallel == 0 else "Set parallel.dp=auto"
        needed, rest = divmod(parallel.dp * model_parallel, config.launch.nodes)
        start = "" if rest else f", or start launch.procs_per_node={needed}"
        yield Problem("parallel.dp", parallel.dp, reason, f"{fix}{start}.")
    elif world % model_parallel:
        reason = f"{ranks} ranks cannot be divided by tp * pp * sp = {model_parallel}."
        yield Problem(
            "launch.procs_per_node", config.launch.procs_per_node, reason, f"Start a multiple of {model_parallel} ranks."
        )


def _min_nodes(config: Config) -> Iterator[Problem]:
    launch = config.launch
    if launch.min_nodes is not None and launch.min_nodes > launch.nodes:
        fix = f"Set it to at most {launch.nodes}, or raise launch.nodes."
        yield Problem("launch.min_nodes", launch.min_nodes, f"launch.nodes={launch.nodes} is less.", fix)
    if launch.max_nodes is not None and launch.max_nodes < launch.nodes:
        fix = f"Set it to at least {launch.nodes}, or lower launch.nodes."
        yield Problem("launch.max_nodes", launch.max_nodes, f"launch.nodes={launch.nodes} is more.", fix)


def _batch(config: Config) -> Iterator[Problem]:
    dp = dp_size(config)
    problem = batch_problem(config.train, dp) if dp is not None else None
    if problem is not None:
        yield problem


def _precision(config: Config) -> Iterator[Problem]:
    precision = config.precision
    if config.zero.stage == 0 and precision.dtype is not Dtype.fp32:
        reason = (
            f"DeepSpeed at stage 0 takes a step with empty gradients at the start and undercounts the gradient norm in "
            f"{precision.dtype.value} (runtime/fp16/unfused_optimizer.py:412)."
        )
        yield Problem("zero.stage", 0, reason, "Use zero=z1, or precision=fp32.")
    if precision.dtype is Dtype.fp16:
        if precision.min_scale < 1 or not float(precision.min_scale).is_integer():
            reason = "DeepSpeed takes whole numbers from 1 on (runtime/precision_config.py:165)."
            yield Problem("precision.min_scale", precision.min_scale, reason, "Set precision.min_scale=1.")
        elif precision.min_scale > 2**precision.initial_scale_power:
            reason = f"it is above the first loss scale, 2**{precision.initial_scale_power}."
            yield Problem(
                "precision.min_scale", precision.min_scale, reason, "Lower it, or raise precision.initial_scale_power."
            )
    elif config.model.attention.startswith("flash_attention") and precision.dtype is Dtype.fp32:
        yield Problem("model.attention", config.model.attention, "it takes bf16 or fp16 only.", "Use precision=bf16 or sdpa.")


def _offload(config: Config) -> Iterator[Problem]:
    offload, stage = config.offload, config.zero.stage
    if offload.optimizer is not Device.none and stage == 0:
        reason = "DeepSpeed ignores it at stage 0, where nothing is sharded."
        yield Problem("offload.optimizer", offload.optimizer.value, reason, "Use zero=z1, z2 or z3, or offload=none.")
    if offload.param is not Device.none and stage < 3:
        reason = f"DeepSpeed ignores it at stage {stage}, where parameters are not sharded."
        yield Problem("offload.param", offload.param.value, reason, "Use zero=z3, or offload=cpu.")
    if offload.param is not Device.none and offload.optimizer is Device.none:
        reason = "masters and optimizer states, which are larger, would stay on the device."
        yield Problem("offload.param", offload.param.value, reason, "Use offload=cpu_param, which moves both.")
    yield from _nvme(config)
    if offload.ratio < 1:
        reason = (
            "DeepSpeed steps the part that stays on the device with a second optimizer (runtime/zero/stage3.py:317), "
            "which the schedule does not reach and whose state is in no checkpoint."
        )
        yield Problem("offload.ratio", offload.ratio, reason, "Set offload.ratio=1.")


def _nvme(config: Config) -> Iterator[Problem]:
    offload, stage = config.offload, config.zero.stage
    if offload.optimizer is Device.nvme and stage in (1, 2):
        reason = f"DeepSpeed at stage {stage} keeps it in host memory without a word (runtime/zero/stage_1_and_2.py:220)."
        yield Problem("offload.optimizer", "nvme", reason, "Use zero=z3, or offload=cpu.")
    if offload.optimizer is Device.nvme and config.optimizer.name not in _SWAPPED_OPTIMIZERS:
        reason = "what it keeps between steps is not known to go to a drive and back as it was."
        fix = f"Use offload=cpu, or an optimizer of {', '.join(_SWAPPED_OPTIMIZERS)}."
        yield Problem("optimizer.name", config.optimizer.name, reason, fix)
    if offload.overlap not in _OVERLAPS:
        fix = f"Set one of {', '.join(_OVERLAPS)}."
        yield Problem("offload.overlap", offload.overlap, "there is no such overlap.", fix)
    if Device.nvme not in (offload.optimizer, offload.param):
        return
    if not (offload.nvme_path or "").strip(" ,"):
        fix = "Set it to a folder on a local drive, such as /mnt/nvme, or use offload=cpu."
        yield Problem("offload.nvme_path", offload.nvme_path, "offload to nvme needs a place.", fix)
    if offload.param is Device.nvme and config.zero.hpz_partition_size > 1:
        size = config.zero.hpz_partition_size
        reason = "the second copy would stay in memory, and is not swapped (runtime/zero/partition_parameters.py:1903)."
        yield Problem("zero.hpz_partition_size", size, reason, "Set it to 1, or offload.param=cpu.")


def _hpz(config: Config) -> Iterator[Problem]:
    size, dp = config.zero.hpz_partition_size, dp_size(config)
    if size > 1 and config.zero.stage < 3:
        reason = f"stage {config.zero.stage} keeps whole parameters."
        yield Problem("zero.hpz_partition_size", size, reason, "Use zero=z3, or zero.hpz_partition_size=1.")
    elif size > 1 and config.parallel.tp > 1:
        reason = "DeepSpeed makes these groups of neighbouring ranks (utils/groups.py:925), which tensor parallelism has split."
        yield Problem("zero.hpz_partition_size", size, reason, "Set it to 1, or parallel.tp=1.")
    elif dp is not None and dp % size:
        divisors = [str(n) for n in range(1, dp + 1) if dp % n == 0]
        yield Problem("zero.hpz_partition_size", size, f"it does not divide dp={dp}.", f"Use one of {', '.join(divisors)}.")


def _checkpoint(config: Config) -> Iterator[Problem]:
    if config.checkpoint.ram_every_steps and config.launch.nodes > 1:
        every = config.checkpoint.ram_every_steps
        reason = f"launch.nodes={config.launch.nodes}: a node that is lost takes its part of the state in memory along."
        yield Problem("checkpoint.ram_every_steps", every, reason, "Set it to 0, or launch.nodes=1.")
    if config.checkpoint.best_metric is None:
        return
    for name in ("eval_every_steps", "eval_samples"):
        if getattr(config.train, name) == 0:
            reason = f"checkpoint.best_metric={config.checkpoint.best_metric} needs evaluations."
            yield Problem(f"train.{name}", 0, reason, "Set it, or checkpoint.best_metric=null.")


def _schedule(config: Config) -> Iterator[Problem]:
    schedule, max_steps = config.schedule, config.train.max_steps
    lengths = {"warmup_steps": schedule.warmup_steps}
    if schedule.name == "wsd":
        lengths["decay_steps"] = schedule.decay_steps
    for name, length in lengths.items():
        key = f"schedule.{name}"
        if isinstance(length, float) and length >= 1:
            reason = "a fraction is a share of train.max_steps, below 1."
            yield Problem(key, length, reason, f"Write an integer for steps ({math.ceil(length)}), or a share such as 0.1.")
        elif length > max_steps:
            reason = f"the run has train.max_steps={max_steps}."
            yield Problem(key, length, reason, f"Set it to at most {max_steps}, or raise train.max_steps.")
    steps = {name: length * max_steps if isinstance(length, float) else length for name, length in lengths.items()}
    if len(steps) > 1 and all(n <= max_steps for n in steps.values()) and sum(steps.values()) > max_steps:
        reason = f"with schedule.warmup_steps={schedule.warmup_steps} it is longer than train.max_steps={max_steps}."
        yield Problem("schedule.decay_steps", schedule.decay_steps, reason, "Shorten one of them.")


def _optimizer(config: Config) -> Iterator[Problem]:
    optimizer = config.optimizer
    if optimizer.name in ("adamw", "lion") and (
        len(optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in optimizer.betas)
    ):
        yield Problem("optimizer.betas", optimizer.betas, "it needs two numbers from 0 to below 1.", "Set it to [0.9,0.95].")


def _model(config: Config) -> Iterator[Problem]:
    model = config.model
    if model.builder != "hf":
        return
    if model.path is None:
        if model.init is Init.pretrained:
            fix = "Set model.path to a Hugging Face folder or hub id, or model.init=random."
            yield Problem("model.init", "pretrained", "there is no model.path to load weights from.", fix)
        if not model.config:
            fix = "Choose a preset (model=llama_15m), or set model.path to a Hugging Face folder or hub id."
            yield Problem("model.path", None, "there is neither a model.path nor a model.config.", fix)
        elif "model_type" not in model.config:
            fix = "Set model.config.model_type, such as llama."
            yield Problem("model.config", model.config, "it does not say which kind of model it describes.", fix)


def _dimensions(config: Config) -> Iterator[Problem]:
    known = config.model.config if config.model.path is None else {}
    max_positions = next((known[name] for name in _POSITION_FIELDS if isinstance(known.get(name), int)), None)
    vocab_size = known.get("vocab_size")
    yield from check_dimensions(config, max_positions, vocab_size if isinstance(vocab_size, int) else None)


def check_dimensions(
    config: Config, max_positions: int | None, vocab_size: int | None, tokenizer_ids: int | None = None
) -> Iterator[Problem]:
    """What does not fit between the data and a model of these dimensions (None: not known).

    Args:
        tokenizer_ids: ids of a tokenizer by path; those of bytes and bpe are known here.
    """
    data = config.data
    if max_positions is not None and data.sequence_length > max_positions:
        reason = f"the model {config.model.name} has {max_positions} positions."
        yield Problem("data.sequence_length", data.sequence_length, reason, f"Set it to at most {max_positions}.")
    ids = {"bytes": BYTE_VOCABULARY, "bpe": data.bpe_vocab_size}.get(data.tokenizer, tokenizer_ids)
    if ids is None or vocab_size is None or ids <= vocab_size:
        return
    reason = f"the tokenizer has {ids} ids, the model {config.model.name} a vocabulary of {vocab_size}."
    larger = f"model.config.vocab_size={ids}, or choose a larger model"
    if data.tokenizer != "bpe":
        fix = "Set" if data.tokenizer == "bytes" else "Use a smaller tokenizer, or set"
        yield Problem("data.tokenizer", data.tokenizer, reason, f"{fix} {larger}.")
    else:
        smaller = f"data.bpe_vocab_size={vocab_size}" if vocab_size >= BYTE_VOCABULARY else "data.tokenizer=bytes"
        yield Problem("data.bpe_vocab_size", data.bpe_vocab_size, reason, f"Set {smaller}, or {larger}.")


def _data(config: Config) -> Iterator[Problem]:
    data = config.data
    if data.source in ("text", "hf") and not data.path:
        what = "a file, glob or folder" if data.source == "text" else "a datasets folder or hub id"
        yield Problem("data.path", data.path, f"data.source={data.source} reads from it.", f"Set data.path to {what}.")
    if data.source in ("python_stdlib", "synthetic"):
        for name in ("path", "validation_path"):
            if getattr(data, name) is not None:
                reason = f"data.source={data.source} reads no files of yours."
                yield Problem(f"data.{name}", getattr(data, name), reason, "Use data=text or data=hf, or leave it out.")
    if data.streaming and data.source != "hf":
        fix = "Use data=hf, or data.streaming=false."
        yield Problem("data.streaming", True, "only Hugging Face datasets can be streamed.", fix)


def _stop(config: Config) -> Iterator[Problem]:
    if config.stop.at_step is not None and config.stop.at_step > config.train.max_steps:
        reason = f"the run ends before, at train.max_steps={config.train.max_steps}."
        yield Problem("stop.at_step", config.stop.at_step, reason, "Lower it, or remove it.")


def _deepspeed_extra(config: Config) -> Iterator[Problem]:
    extra = config.deepspeed_extra
    yield from deepspeed_keys.extra_problems(extra)
    accumulation = _at(extra, "data_types.grad_accum_dtype")
    key = "deepspeed_extra.data_types.grad_accum_dtype"
    if accumulation is not None and accumulation not in [dtype.value for dtype in Dtype]:
        yield Problem(key, accumulation, "there is no such type.", "Give bf16, fp16 or fp32.")
    elif accumulation is not None and accumulation != config.precision.dtype.value:
        if config.zero.stage == 0:
            reason = "DeepSpeed at stage 0 takes only the type of the model (runtime/engine.py:2323)."
            yield Problem(key, accumulation, reason, "Use zero=z2 or z3, or remove it.")
        elif config.zero.stage == 1 and config.offload.optimizer is Device.none:
            reason = "DeepSpeed at stage 1 takes another optimizer for it (runtime/engine.py:2305) that is not saved here."
            yield Problem(key, accumulation, reason, "Use zero=z2 or z3, or remove it.")
    if _at(extra, "zero_optimization.offload_optimizer.super_offload") and config.zero.stage < 3:
        key = "deepspeed_extra.zero_optimization.offload_optimizer.super_offload"
        yield Problem(key, True, "DeepSpeed ignores it below stage 3.", "Use zero=z3, or remove it.")


def _at(mapping: dict[str, Any], path: str) -> Any:
    value: Any = mapping
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


RULES: tuple[Callable[[Config], Iterator[Problem]], ...] = (
    _names,
    _run_name,
    _available,
    pipeline_rules,
    _order,
    _world,
    _min_nodes,
    _batch,
    _precision,
    _offload,
    _hpz,
    sequence_parallel,
    _schedule,
    _checkpoint,
    _optimizer,
    _model,
    _dimensions,
    _data,
    _stop,
    _deepspeed_extra,
)
"""Every rule, in the order in which problems are told."""
