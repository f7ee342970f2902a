"""The yardstick of a language model: what knowing the frequency of each token, and nothing else, would give."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from anyshard.trainer.callbacks.base import Callback

if TYPE_CHECKING:
    from anyshard.trainer.trainer import Trainer


MAX_TOKENS = 20_000_000
"""Tokens that are counted: far more than frequencies need, little enough to be counted in a blink."""


def unigram_loss(train_counts: np.ndarray, validation_counts: np.ndarray) -> float:
    """Cross-entropy in nats per token of the validation tokens under the training frequencies, one added to each count.

    Shape: both arrays have one count for each token of the vocabulary.
    """
    smoothed = train_counts + 1.0
    log_probabilities = np.log(smoothed / smoothed.sum())
    return float(-(validation_counts * log_probabilities).sum() / validation_counts.sum())


class Unigram(Callback):
    """Adds `eval/unigram_perplexity` to evaluations of token datasets."""

    def __init__(self) -> None:
        self._perplexity: float | None = None

    def on_evaluation(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """Compute it once and add it to the record."""
        task = trainer.task
        if task.tokenizer is None:
            return
        if self._perplexity is None:
            size = task.tokenizer.vocab_size
            counts = [np.bincount(data.tokens[:MAX_TOKENS], minlength=size) for data in (task.train_data, task.validation_data)]
            self._perplexity = math.exp(unigram_loss(counts[0], counts[1]))
        record["eval/unigram_perplexity"] = self._perplexity
