"""Cross-entropy over a vocabulary that is split over ranks: the logits of all tokens are never on one rank."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


def output_head(model: Any) -> Any:
    """The module of a model (or of an engine around it) that makes logits; None where it names none."""
    module = getattr(model, "module", model)
    get = getattr(module, "get_output_embeddings", None)
    return get() if get is not None else None


def split_head(model: Any) -> Any:
    """The output head of a model (or of an engine around it) whose vocabulary is split; None where it is whole."""
    head = output_head(model)
    return head if getattr(head, "gather_output", False) else None


@contextlib.contextmanager
def local_logits(head: Any) -> Iterator[None]:
    """While it lasts the head gives the logits of this rank's tokens only."""
    head.gather_output = False
    try:
        yield
    finally:
        head.gather_output = True


def cross_entropy(logits_NV: torch.Tensor, targets_N: torch.Tensor, head: Any, *, ignore_index: int) -> torch.Tensor:
    """Loss of every position in float32; 0 where it has no target.

    Shape: logits_NV has the tokens of this rank. Returns [N].
    Collective: the ranks that share the head call it; it blocks (three all-reduces of N numbers).
    Source: deepspeed 0.19.8 sequence/cross_entropy.py:61. Its `vocab_parallel_cross_entropy` waits for the device at every
    call, to look for targets outside of the vocabulary; here `check_vocabulary` has seen to that before the start.
    """
    from deepspeed.sequence.cross_entropy import _VocabParallelCrossEntropy

    first = sum(head._partition_sizes[: head.tp_index])
    last = first + head._partition_sizes[head.tp_index]
    losses_N: torch.Tensor = _VocabParallelCrossEntropy.apply(logits_NV, targets_N, head.mp_group, first, last, ignore_index)
    return losses_N
