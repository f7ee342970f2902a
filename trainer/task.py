"""What is trained: a model, its data and three small functions. A causal language model is one task of many (`lm.py`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Batch = dict[str, Tensor]


@dataclass
class Task:
    """Everything `fit` needs to know of what it trains.

    Args:
        model: builds the module; called once on every rank. Weights must not depend on the rank. Under ZeRO-3 the module
            is partitioned right after it is built.
        train_data: map-style data set (`len` and indexing); the trainer draws the order.
        collate: turns a list of samples into a batch: a dictionary of tensors on the CPU, first dimension = samples.
        loss: `loss(model, batch)` is the mean loss over the batch's targets, a scalar. Call the given model (it is the
            DeepSpeed engine), not your own reference to it.
        validation_data: data set of the evaluation; None evaluates nothing.
        predict: `predict(model, batch)` gives named numbers to average over the validation data ({"accuracy": ...}).
        num_targets: `num_targets(batch)` counts the targets that `loss` averages over, where that varies from batch to
            batch; the gradient is then the mean over all targets of the global batch, whatever the layout.
        tokens_per_sample: tokens in one sample, for throughput; 1 counts samples.
        flops_per_token: floating-point operations of one token's forward and backward, for MFU.
        perplexity: report the exponential of the validation loss as well.
        tokenizer: makes and decodes token ids, for callbacks that show text.
    """

    model: Callable[[], nn.Module]
    train_data: Any
    collate: Callable[[list[Any]], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    validation_data: Any = None
    predict: Callable[[nn.Module, Batch], dict[str, Tensor]] | None = None
    num_targets: Callable[[Batch], Tensor] | None = None
    tokens_per_sample: int = 1
    flops_per_token: float | None = None
    perplexity: bool = False
    tokenizer: Any = None
