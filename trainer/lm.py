"""The task of a Hugging Face causal language model on packed tokens."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyshard.configs import schema
from anyshard.configs.errors import ConfigError, Problem
from anyshard.parallel import sequence, vocabulary
from anyshard.parallel.groups import Groups
from anyshard.trainer.data.build import Splits
from anyshard.trainer.data.loader import collate_tokens
from anyshard.trainer.experts import Balancer
from anyshard.trainer.task import Batch, Task
from anyshard.trainer.tiling import TiledHead

IGNORE = -100
"""Label of a position without target (torch.nn.functional.cross_entropy's default ignore_index)."""


@dataclasses.dataclass(frozen=True)
class Manner:
    """How the loss is computed.

    Attributes:
        tile_tokens: tokens whose logits exist at once; None for those of the whole batch.
        balancer: adds the load-balancing loss of a mixture of experts.
    """

    tile_tokens: int | None = None
    balancer: Balancer = dataclasses.field(default_factory=Balancer)


def causal_lm_loss(model: nn.Module, batch: Batch, manner: Manner = Manner()) -> Tensor:
    """Mean cross-entropy over the targets of a batch, in float32; 0 where it has none. Mixtures of experts add their own.

    Shape: input_ids_BS, labels_BS (labels are shifted already: labels[:, t] follows input_ids[:, t]).
    """
    total, balance = _loss(model, batch, "sum", manner)
    loss = total / count_targets(batch).clamp(min=1)
    return loss if balance is None else loss + balance


def full_lm_loss(model: nn.Module, batch: Batch, manner: Manner = Manner()) -> Tensor:
    """The same of a batch whose every position has a target: nothing needs to be counted."""
    loss, balance = _loss(model, batch, "mean", manner)
    return loss if balance is None else loss + balance


def _loss(model: nn.Module, batch: Batch, reduction: str, manner: Manner) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy in float32, its sum over all targets or its mean where every position has one; and the balancing loss."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    head = vocabulary.split_head(model)

    def cross_entropy(logits_NV: Tensor, targets_N: Tensor, reduction: str = "none") -> Tensor:
        if head is None:
            return F.cross_entropy(logits_NV.float(), targets_N, ignore_index=IGNORE, reduction=reduction)
        losses_N = vocabulary.cross_entropy(logits_NV, targets_N, head, ignore_index=IGNORE)
        return losses_N if reduction == "none" else losses_N.sum() if reduction == "sum" else losses_N.mean()

    counted_N = batch["labels"].flatten() != IGNORE
    if manner.tile_tokens is not None:
        with TiledHead(vocabulary.output_head(model), batch["labels"], cross_entropy, manner.tile_tokens) as tiled:
            output = model(**inputs, use_cache=False)
        losses_BT = tiled.losses(output)
        loss = losses_BT.sum() if reduction == "sum" else losses_BT.mean()
    else:
        with contextlib.nullcontext() if head is None else vocabulary.local_logits(head):
            output = model(**inputs, use_cache=False)
        loss = cross_entropy(output.logits.flatten(0, 1), batch["labels"].flatten(), reduction)
    return loss, manner.balancer.loss(model, output, counted_N)


def count_targets(batch: Batch) -> Tensor:
    """Positions of a batch that have a target."""
    return (batch["labels"] != IGNORE).sum()


def in_stretches(loss: Callable[[nn.Module, Batch], Tensor], groups: Groups) -> Callable[[nn.Module, Batch], Tensor]:
    """`loss` of this rank's tokens of a batch, of which the ranks of `groups.sp` have the same.

    Collective: those ranks call it; attention exchanges heads for tokens.
    """

    def part_loss(model: nn.Module, batch: Batch) -> Tensor:
        stretch = sequence.stretch_of(batch["input_ids"], batch.get("position_ids"), groups)
        part = {
            "input_ids": stretch.cut(batch["input_ids"], 0),
            "labels": stretch.cut(batch["labels"], IGNORE),
            "position_ids": stretch.cut(stretch.positions_BS, 0),
        }
        part["attention_mask"] = torch.ones_like(part["input_ids"])  # has `sequence` look for documents, not transformers
        with sequence.computing(stretch):
            return loss(model, part)

    return part_loss


def count_in_stretch(groups: Groups) -> Callable[[Batch], Tensor]:
    """Counts the targets of this rank's tokens of a batch."""

    def count(batch: Batch) -> Tensor:
        stretch = sequence.stretch_of(batch["input_ids"], batch.get("position_ids"), groups)
        return count_targets({"labels": stretch.cut(batch["labels"], IGNORE)})

    return count


def build_lm_task(
    config: schema.Config, splits: Splits, build_model: Callable[[], nn.Module], groups: Groups | None = None
) -> Task:
    """The task of `config.model` on `config.data`.

    Args:
        groups: whose ranks of `sp` share the sequences; None for whole ones.
    """
    varies = splits.train.targets_per_sample is None or config.data.sequence_length % config.parallel.sp > 0
    manner = Manner(config.train.loss_tile_tokens, Balancer(groups, config.train.balance_experts_over))
    loss: Callable[[nn.Module, Batch], Tensor] = functools.partial(causal_lm_loss if varies else full_lm_loss, manner=manner)
    count: Callable[[Batch], Tensor] = count_targets
    if groups is not None and groups.sp is not None:
        loss, count = in_stretches(loss, groups), count_in_stretch(groups)
    return Task(
        model=build_model,
        train_data=splits.train,
        validation_data=splits.validation,
        collate=collate_tokens,
        loss=loss,
        num_targets=count if varies else None,
        tokens_per_sample=config.data.sequence_length,
        perplexity=True,
        tokenizer=splits.tokenizer,
    )


def check_vocabulary(model_vocab_size: int, tokenizer_vocab_size: int, tokenizer: str) -> None:
    """Refuse a tokenizer that makes ids which the model has no embedding for.

    Raises:
        ConfigError: the tokenizer's vocabulary is larger than the model's.
    """
    if tokenizer_vocab_size > model_vocab_size:
        raise ConfigError(
            Problem(
                "data.tokenizer",
                tokenizer,
                f"it has {tokenizer_vocab_size} tokens, but the model embeds {model_vocab_size}.",
                f"Use a smaller tokenizer, or a model with model.config.vocab_size={tokenizer_vocab_size}.",
            )
        )
