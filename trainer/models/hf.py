"""Hugging Face causal language models: presets, any configuration by path, any checkpoint, built within a memory bound.

The model is made on the meta device, where it takes no memory, and then filled one module at a time (`fill.py`) from the
seed or from safetensors (`pretrained.py`). Under ZeRO-3 each module's parameters are partitioned before the next module
exists.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, initialization
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from anyshard.configs import schema
from anyshard.configs.errors import ConfigError, Problem
from anyshard.configs.sources import OURS, read_yaml
from anyshard.parallel import sequence
from anyshard.parallel.groups import Groups
from anyshard.parallel.tensor import Sharder
from anyshard.trainer.models.fill import Filler, Partition
from anyshard.trainer.models.pretrained import load, local_path
from anyshard.trainer.tiling import tile_blocks

if TYPE_CHECKING:
    from anyshard.parallel.pipeline import Pipeline
    from anyshard.parallel.stages import Costs, Division

_SIZE = re.compile(r"(hidden_size|intermediate_size|vocab_size|head_dim|num_|n_)")
# taken by PretrainedConfig beside the fields of a configuration class (transformers 5.23 configuration_utils.py:428)
COMMON_KEYS = frozenset({"model_type", "torch_dtype", "rope_theta", "rope_scaling", "partial_rotary_factor", "num_labels"})
_ALLOWED = "Set a value that the message allows."
_FETCH = (
    "Check the id and the network, and unset HF_HUB_OFFLINE; or run 'hf download {}' once where there is a network, "
    "or set model.path to a folder."
)


def hf_config(model: schema.Model, data: schema.Data) -> PretrainedConfig:
    """The transformers configuration of `model`, with our attention implementation and without a key-value cache.

    Raises:
        ConfigError: there is no such model, a key of `model.config` is unknown or refused, or `data` does not fit the model.
    """
    config = _from_path(model, model.path) if model.path else _from_fields(model)
    config._attn_implementation = model.attention
    config.use_cache = False
    _check_data(config, data)
    return config


def build(
    config: schema.Config,
    *,
    device: torch.device,
    dtype: torch.dtype,
    partition: Partition | None = None,
    groups: Groups | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> PreTrainedModel:
    """Build the model of `config.model` with its weights in `dtype` on `device`, ready to train.

    The weights depend on `config.seed` and the parameters' names alone (`model.init=random`), or are those of the checkpoint.
    Memory: a process holds what `partition` keeps of the finished modules (its share; everything without `partition`), plus

    - random: the parameters of one module in float32, and once more in `dtype` where that is another or another device;
    - pretrained: one tensor in `dtype`, and the pages of the file it is read from (the system may drop those). A tensor that
      is fused from many (experts of a mixture) takes up to three times its size.

    On top comes what the C library keeps of blocks that it was given back: glibc reuses those below 32 MiB.

    Args:
        device: where the parameters go; on the meta device nothing is filled.
        partition: ZeRO-3: called with the parameters of one module after another, turns each into this rank's share.
        groups: whose tensor-parallel ranks share the model, whose sequence-parallel ranks the sequences; None: neither.
        say: prints a line about what takes time.

    Collective: every rank calls it where `partition` communicates.

    Raises:
        ConfigError: the configuration makes no model, or the checkpoint does not fit it.
    """
    model = _on_meta(hf_config(config.model, config.data), config.model)
    sharder = _sharder(model, groups, config)
    if device.type != "meta":
        _fill(model, config, device=device, dtype=dtype, partition=partition, sharder=sharder, say=say)
        if groups is not None and groups.sp is not None:
            sequence.install(model, groups, str(config.model.name))
    return _ready(model, config)


def build_stage(
    config: schema.Config,
    *,
    device: torch.device,
    dtype: torch.dtype,
    groups: Groups,
    say: Callable[[str], None] = lambda _: None,
) -> Pipeline:
    """Build this rank's stage of the model of `config.model`; nothing of the other stages ever has memory.

    Collective: every rank calls it; it blocks (the stage makes process groups).

    Raises:
        ConfigError: the configuration makes no model, the checkpoint does not fit it, or it cannot be divided into stages.
    """
    from anyshard.parallel.pipeline import Pipeline, divide, keep_stage

    hf = hf_config(config.model, config.data)
    model = _on_meta(hf, config.model)

    def measured(division: Division) -> Costs | None:
        if config.parallel.pp_balance is not schema.Balance.time or config.parallel.pp_layers is not None:
            return None
        from anyshard.trainer.models.stage_times import measure

        say("measuring the time of layers, embedding and head")
        return measure(lambda: _on_meta(hf, config.model), division, config, device=device, dtype=dtype)

    stages = divide(model, config.parallel, config.model.name, measured)
    sharder = _sharder(model, groups, config)
    whole = keep_stage(model, stages, groups.pp_rank)
    if sharder is not None:
        sharder.restrict()
    reference = _on_meta(hf, config.model) if config.model.init is schema.Init.pretrained else None
    _fill(model, config, device=device, dtype=dtype, partition=None, sharder=sharder, say=say, reference=reference)
    return Pipeline(_ready(model, config), stages, whole, groups)


def _sharder(model: PreTrainedModel, groups: Groups | None, config: schema.Config) -> Sharder | None:
    return Sharder(model, groups, config.model.name) if groups is not None and groups.tp is not None else None


def _fill(
    model: PreTrainedModel,
    config: schema.Config,
    *,
    device: torch.device,
    dtype: torch.dtype,
    partition: Partition | None,
    sharder: Sharder | None,
    say: Callable[[str], None],
    reference: PreTrainedModel | None = None,
) -> None:
    """Give the model its values and its split layers.

    Args:
        reference: the whole model on the meta device, where `model` is a stage of it.
    """
    place = None if sharder is None else sharder.place
    filler = Filler(model, device=device, dtype=dtype, partition=partition, place=place, whole=reference)
    if config.model.init is schema.Init.pretrained:
        load(filler, str(config.model.path), seed=config.seed, say=say)
    else:
        filler.init(filler.slots, config.seed)
    if sharder is not None:
        sharder.finish()
    if config.train.mlp_tile_tokens is not None:
        tile_blocks(model, config.train.mlp_tile_tokens, str(config.model.name))


def _ready(model: PreTrainedModel, config: schema.Config) -> PreTrainedModel:
    if config.train.activation_checkpointing:
        with _refused("train.activation_checkpointing", True):
            # transformers 5.23 renamed it, and warns of the old name
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
    model.train()
    return model


def _on_meta(hf: PretrainedConfig, model: schema.Model) -> PreTrainedModel:
    if type(hf) not in MODEL_FOR_CAUSAL_LM_MAPPING and "AutoModelForCausalLM" not in getattr(hf, "auto_map", {}):
        key, value = ("model.path", model.path) if model.path else ("model.config.model_type", hf.model_type)
        reason = f"transformers has no causal language model with a {type(hf).__name__}."
        raise ConfigError(
            Problem(key, value, reason, "Choose another model, or register a builder of your own (model.builder).")
        )
    key, value = "model.attention", model.attention
    with torch.device("meta"), initialization.meta_device_safe_creation_ops(), _refused(key, value):
        built: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call, unused-ignore]
            hf, dtype=torch.float32, trust_remote_code=model.trust_remote_code
        )
    return built


def _from_path(model: schema.Model, path: str) -> PretrainedConfig:
    local = Path(local_path(path))
    fix = "Set it to a folder with a whole config.json, or to a hub id." if local.exists() else _FETCH.format(path)
    with _refused("model.path", path, not_found=fix):
        loaded: PretrainedConfig = AutoConfig.from_pretrained(str(local), trust_remote_code=model.trust_remote_code)
    if not model.config:
        return loaded
    _refuse_another_preset(model, loaded)
    kind = model.config.get("model_type", loaded.model_type)
    if kind != loaded.model_type:
        reason = f"the model of model.path={path} is a {loaded.model_type}."
        raise ConfigError(Problem("model.config.model_type", kind, reason, "Use model=hf with model.path, or leave it out."))
    _check_keys(type(loaded), model.config)
    with _refused("model.config", model.config):
        merged: PretrainedConfig = type(loaded).from_dict({**loaded.to_dict(), **model.config})
    return merged


def _refuse_another_preset(model: schema.Model, loaded: PretrainedConfig) -> None:
    """Refuse `model.path` beside one of our presets that describes another model: merged over, it would hide that of the path.

    Raises:
        ConfigError: it does.
    """
    file = OURS / "model" / f"{model.name}.yaml"
    preset = read_yaml(file).get("config", {}) if file.is_file() else {}
    there = loaded.to_dict()
    sizes = [name for name in preset if _SIZE.match(name) and model.config.get(name) == preset[name]]
    other = [f"{name}={preset[name]} (there {there[name]})" for name in sizes if there.get(name, preset[name]) != preset[name]]
    if other:
        reason = f"model={model.name} describes another model: {', '.join(other)}."
        raise ConfigError(Problem("model.path", model.path, reason, "Use model=hf with model.path."))


def _from_fields(model: schema.Model) -> PretrainedConfig:
    kind = model.config.get("model_type")
    if kind is None:
        fix = "Choose a preset (model=llama_15m), set model.path, or model.config.model_type."
        raise ConfigError(Problem("model.config.model_type", kind, "nothing says what the model is.", fix))
    if kind not in CONFIG_MAPPING:
        fix = f"{_did_you_mean(kind, CONFIG_MAPPING)}transformers knows {len(CONFIG_MAPPING)}, such as llama, gpt2, qwen3."
        raise ConfigError(Problem("model.config.model_type", kind, "transformers has no model of this kind.", fix))
    _check_keys(CONFIG_MAPPING[kind], model.config)
    with _refused("model.config", model.config):
        made: PretrainedConfig = AutoConfig.for_model(**model.config)
    return made


def _check_keys(config_class: type[PretrainedConfig], given: dict[str, Any]) -> None:
    if not is_dataclass(config_class):  # remote code of before transformers 5 takes what it likes
        return
    known = {f.name for f in fields(config_class)} | set(config_class.attribute_map) | COMMON_KEYS
    problems = [
        Problem(
            f"model.config.{name}",
            value,
            f"{config_class.__name__} has no such field.",
            f"{_did_you_mean(name, known)}See the fields of transformers.{config_class.__name__}.",
        )
        for name, value in given.items()
        if name not in known
    ]
    if problems:
        raise ConfigError(problems)


def _check_data(config: PretrainedConfig, data: schema.Data) -> None:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and data.sequence_length > positions:
        raise ConfigError(
            Problem(
                "data.sequence_length",
                data.sequence_length,
                f"the model has {positions} positions.",
                f"Set data.sequence_length={positions} or less, or choose a model with more positions.",
            )
        )


def _did_you_mean(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"Did you mean {near[0]}? " if near else ""


@contextlib.contextmanager
def _refused(key: str, value: object, *, not_found: str = _ALLOWED) -> Iterator[None]:
    """Turn what transformers raises for a configuration that it cannot use into our error.

    Args:
        not_found: what to do where it could not be read at all.
    """
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, TypeError, OSError, KeyError, ImportError, AttributeError, StrictDataclassError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = f"transformers refuses it: {' '.join(lines)[:500]}"
        could_read = not isinstance(error, OSError)
        raise ConfigError(Problem(key, value, reason, _ALLOWED if could_read else not_found)) from error
