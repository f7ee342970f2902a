"""Sequence parallelism (DeepSpeed-Ulysses): the ranks of `groups.sp` share each sequence, every one a stretch of its tokens.

All layers but attention look at one token at a time, so each rank computes its own. Around attention the tensors are exchanged:
before it every rank gets all tokens of some heads, after it its own tokens of all heads.

DeepSpeed's `UlyssesSPAttentionHF` drops every mask, wants the same batch size in each call, and has the gradient of its ranks
summed at ZeRO 1 and 2 but averaged at ZeRO 3. Here the exchange alone is DeepSpeed's. The masks are those that transformers
makes for the whole sequence (causal, sliding windows, separate documents), and to DeepSpeed the ranks are data-parallel ones,
whose gradients it averages at every stage; that a rank has a part of the targets only is in the weight of its loss
(`Trainer._scales`), as for any other micro-batch.

Source: Jacobs et al., "DeepSpeed Ulysses", arXiv 2309.14509; deepspeed 0.19.8 runtime/sequence_parallel/ulysses_sp.py:55.

Shape suffixes: B sequences, S tokens of the whole sequence, T of this rank, H heads, D features of a head.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from anyshard.configs.errors import ConfigError, Problem
from anyshard.configs.sequence_rules import ATTENTIONS, head_problem
from anyshard.parallel.groups import Groups

PREFIX = "ulysses_"
_PER_HEAD = ("position_bias", "s_aux", "head_mask", "alibi")
"""Arguments of attention functions that have a value for each head or position, which nothing here divides."""
_BY_LENGTH = ("dynamic", "longrope")
"""Rotary embeddings that change with the number of tokens at hand."""
_ATTENTION_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")


@dataclass(frozen=True, eq=False)
class Stretch:
    """The tokens of each sequence that this rank computes.

    Attributes:
        positions_BS: of all tokens, those of padding at the end included; they start anew at each document.
    """

    group: dist.ProcessGroup
    degree: int
    rank: int
    positions_BS: torch.Tensor

    def cut(self, whole_BS: torch.Tensor, padding: int) -> torch.Tensor:
        """This rank's tokens of a tensor, filled up with `padding` at the end. Shape: [B, any up to S] -> [B, T]."""
        length = self.positions_BS.shape[1]
        width = length // self.degree
        whole_BS = F.pad(whole_BS, (0, length - whole_BS.shape[1]), value=padding)
        return whole_BS[:, self.rank * width : (self.rank + 1) * width]


def stretch_of(input_ids_BS: torch.Tensor, positions_BS: torch.Tensor | None, groups: Groups) -> Stretch:
    """The tokens of a batch that this rank computes; sequences are padded at their end to a multiple of the ranks."""
    assert groups.sp is not None
    degree, length = groups.mesh.sp, input_ids_BS.shape[1]
    missing = -length % degree
    if positions_BS is None:
        positions_BS = torch.arange(length + missing, device=input_ids_BS.device).expand(input_ids_BS.shape[0], -1)
    elif missing:
        # tokens after the last one, of the same document: causal attention shows them to nobody
        more = torch.arange(1, missing + 1, device=positions_BS.device)
        positions_BS = torch.cat([positions_BS, positions_BS[:, -1:] + more], dim=1)
    return Stretch(groups.sp, degree, groups.sp_rank, positions_BS)


@dataclass(frozen=True, eq=False)
class WholeMask:
    """What transformers made of the whole sequence, on its way through the layers to the attention of each."""

    stretch: Stretch
    mask: Any


_STRETCH: contextvars.ContextVar[Stretch | None] = contextvars.ContextVar("anyshard_stretch", default=None)


@contextlib.contextmanager
def computing(stretch: Stretch) -> Iterator[None]:
    """While it lasts models are given the tokens of a stretch. Without it they compute whole sequences, on each rank alone."""
    token = _STRETCH.set(stretch)
    try:
        yield
    finally:
        _STRETCH.reset(token)


def install(model: Any, groups: Groups, model_name: str) -> None:
    """Have the attention of a Hugging Face model exchange heads for tokens where it is given a stretch.

    Args:
        model: after tensor parallelism, which may have left some of the heads.

    Raises:
        ConfigError: its heads do not divide, or it mixes tokens elsewhere than in attention that can be exchanged.
    """
    from transformers import PretrainedConfig
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config = model.config.get_text_config()
    core = config._attn_implementation
    problem = _problem(model, config, groups, model_name)
    if problem is not None:
        raise ConfigError(problem)
    name = PREFIX + core
    ALL_ATTENTION_FUNCTIONS.register(name, _attention(core))
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, _mask(core))
    assert groups.sp is not None
    from deepspeed.sequence.layer import register_all_to_all_group

    register_all_to_all_group(groups.sp)
    # only now: while the model was built, transformers looked whether it can use the implementation itself
    configs = {id(each): each for each in (getattr(part, "config", None) for part in model.modules())}
    for each in configs.values():
        if isinstance(each, PretrainedConfig) and each._attn_implementation == core:
            each._attn_implementation = name


def _problem(model: Any, config: Any, groups: Groups, model_name: str) -> Problem | None:
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    sp, tp = groups.mesh.sp, groups.mesh.tp
    if problem := head_problem(heads, kv_heads, sp=sp, tp=tp, model=model_name):
        return problem
    why = None
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {str(part.get("rope_type")) for part in (rope, *rope.values()) if isinstance(part, dict)}
    others = sorted(set(getattr(config, "layer_types", None) or ()) - set(_ATTENTION_LAYERS))
    if config._attn_implementation not in ATTENTIONS:
        fix = f"Set model.attention to one of {', '.join(ATTENTIONS)}."
        reason = f"the model {model_name} takes attention {config._attn_implementation}, which Ulysses cannot give whole masks."
        return Problem("model.attention", config._attn_implementation, reason, fix)
    if others:
        why = f"it has layers of kind {', '.join(others)}"
    elif any(isinstance(part, nn.modules.conv._ConvNd | nn.RNNBase) for part in model.modules()):
        why = "it has convolutions or recurrent layers, which mix tokens"
    elif not type(model)._can_set_attn_implementation():
        why = "it does not take its attention from transformers' ALL_ATTENTION_FUNCTIONS"
    elif kinds & set(_BY_LENGTH):
        why = f"its rotary embeddings ({', '.join(sorted(kinds & set(_BY_LENGTH)))}) depend on the length of the sequence"
    if why is None:
        return None
    fix = "Set parallel.sp=1, or choose a model whose layers mix tokens in attention alone."
    return Problem("parallel.sp", sp, f"the sequences of the model {model_name} cannot be split: {why}.", fix)


def _mask(core: str) -> Callable[..., Any]:
    """The maker of masks for `core`, which in a stretch makes that of the whole sequence."""

    def mask(**asked: Any) -> Any:
        from transformers.masking_utils import (
            ALL_MASK_ATTENTION_FUNCTIONS,
            causal_mask_function,
            find_packed_sequence_indices,
            packed_sequence_compatibility_function,
        )

        make, stretch = ALL_MASK_ATTENTION_FUNCTIONS[core], _STRETCH.get()
        if stretch is None:
            return make(**asked)
        # a mask of ones was given with the tokens, so that `mask_function` knows nothing of documents yet
        positions_BS = stretch.positions_BS
        documents_BS = find_packed_sequence_indices(positions_BS)
        if documents_BS is not None:
            inner = asked.get("mask_function", causal_mask_function)
            asked |= {
                "mask_function": packed_sequence_compatibility_function(inner, positions_BS, documents_BS),
                "allow_is_causal_skip": False,
            }
        length = positions_BS.shape[1]
        whole = {"q_length": length, "kv_length": length, "q_offset": 0, "kv_offset": 0, "attention_mask": None}
        return WholeMask(stretch, make(**{**asked, **whole}))

    return mask


def _attention(core: str) -> Callable[..., Any]:
    """The attention function `core` over whole sequences."""

    def attention(
        module: nn.Module, query_BHTD: torch.Tensor, key_BHTD: torch.Tensor, value_BHTD: torch.Tensor, mask: Any, **rest: Any
    ) -> tuple[torch.Tensor, Any]:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        attend = ALL_ATTENTION_FUNCTIONS[core]
        if not isinstance(mask, WholeMask):
            if _STRETCH.get() is not None:
                raise ConfigError(_unknown(module, "does not take the mask that transformers made for it"))
            return attend(module, query_BHTD, key_BHTD, value_BHTD, mask, **rest)  # type: ignore[no-any-return]
        unknown = [name for name in _PER_HEAD if rest.get(name) is not None]
        if unknown:
            raise ConfigError(_unknown(module, f"is given {', '.join(unknown)}, which nothing divides"))
        stretch = mask.stretch
        if "position_ids" in rest or "flash" in core:  # flash attention finds the documents in them
            rest["position_ids"] = stretch.positions_BS
        query, key, value = (_to_heads(x, stretch) for x in (query_BHTD, key_BHTD, value_BHTD))
        with _groups_of_queries(module, query.shape[1] // key.shape[1]):
            output_BSHD, weights = attend(module, query, key, value, mask.mask, **rest)
        return _to_tokens(output_BSHD, stretch), weights

    return attention


def _unknown(module: nn.Module, why: str) -> Problem:
    fix = "Set parallel.sp=1, or choose a model of another architecture (docs/parallelism.md names those that are tested)."
    return Problem("parallel.sp", ">1", f"{type(module).__name__} cannot be split along the sequence: it {why}.", fix)


@contextlib.contextmanager
def _groups_of_queries(module: Any, count: int) -> Iterator[None]:
    """Where ranks hold the same key-value head, a module has fewer queries for each than it counts."""
    before = getattr(module, "num_key_value_groups", count)
    if before == count:
        yield
        return
    module.num_key_value_groups = count
    try:
        yield
    finally:
        module.num_key_value_groups = before


def _to_heads(x_BHTD: torch.Tensor, stretch: Stretch) -> torch.Tensor:
    """From this rank's tokens of all heads to all tokens of its heads; those fewer than the ranks are on several of them.

    Shape: [B, H, T, D] -> [B, H / sp or 1, S, D].
    """
    degree = stretch.degree
    if x_BHTD.shape[1] < degree:
        x_BHTD = x_BHTD.repeat_interleave(degree // x_BHTD.shape[1], dim=1)
    batch, heads, length, features = x_BHTD.shape
    parts = x_BHTD.reshape(batch, degree, heads // degree, length, features).movedim(1, 0)
    parts = _exchange(parts, stretch.group)
    return parts.permute(1, 2, 0, 3, 4).reshape(batch, heads // degree, degree * length, features)


def _to_tokens(x_BSHD: torch.Tensor, stretch: Stretch) -> torch.Tensor:
    """Back again. Shape: [B, S, H / sp, D] -> [B, T, H, D]."""
    batch, length, heads, features = x_BSHD.shape
    degree = stretch.degree
    parts = x_BSHD.reshape(batch, degree, length // degree, heads, features).movedim(1, 0)
    parts = _exchange(parts, stretch.group)
    return parts.permute(1, 2, 0, 3, 4).reshape(batch, length // degree, degree * heads, features)


def _exchange(parts: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Give part i of the first dimension to rank i, and get its part for this rank; so does the gradient.

    Collective: the ranks of the group call it; it blocks.
    Source: deepspeed 0.19.8 sequence/layer.py:351, an operator that torch.compile knows the gradient of.
    """
    from deepspeed.sequence.layer import _dim_zero_all_to_all

    exchanged: torch.Tensor = _dim_zero_all_to_all(group, parts.contiguous())
    return exchanged
