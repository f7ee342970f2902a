"""The task of a Hugging Face causal language model on packed tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from anyshard.configs import schema
from anyshard.configs.errors import ConfigError, Problem
from anyshard.parallel import vocabulary
from anyshard.trainer.data.build import Splits
from anyshard.trainer.data.loader import collate_tokens
from anyshard.trainer.task import Batch, Task

IGNORE = -100
"""Label of a position without target (torch.nn.functional.cross_entropy's default ignore_index)."""


def causal_lm_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy over the targets of a batch, in float32; 0 where it has none.

    Shape: input_ids_BS, labels_BS (labels are shifted already: labels[:, t] follows input_ids[:, t]).
    """
    return _loss(model, batch, "sum") / count_targets(batch).clamp(min=1)


def full_lm_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The same of a batch whose every position has a target: nothing needs to be counted."""
    return _loss(model, batch, "mean")


def _loss(model: nn.Module, batch: Batch, reduction: str) -> Tensor:
    """Cross-entropy in float32, its sum over all targets, or its mean where every position has one."""
    targets_N = batch["labels"].flatten()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    head = vocabulary.split_head(model)
    if head is None:
        logits_BSV: Tensor = model(**inputs, use_cache=False).logits
        return F.cross_entropy(logits_BSV.float().flatten(0, 1), targets_N, ignore_index=IGNORE, reduction=reduction)
    with vocabulary.local_logits(head):
        logits_BSV = model(**inputs, use_cache=False).logits
    losses_N = vocabulary.cross_entropy(logits_BSV.flatten(0, 1), targets_N, head, ignore_index=IGNORE)
    return losses_N.sum() if reduction == "sum" else losses_N.mean()


def count_targets(batch: Batch) -> Tensor:
    """Positions of a batch that have a target."""
    return (batch["labels"] != IGNORE).sum()


def build_lm_task(config: schema.Config, splits: Splits, build_model: Callable[[], nn.Module]) -> Task:
    """The task of `config.model` on `config.data`."""
    varies = splits.train.targets_per_sample is None
    return Task(
        model=build_model,
        train_data=splits.train,
        validation_data=splits.validation,
        collate=collate_tokens,
        loss=causal_lm_loss if varies else full_lm_loss,
        num_targets=count_targets if varies else None,
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
