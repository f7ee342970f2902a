"""The digest of batches: it changes with every value, and its error names the ranks."""

from __future__ import annotations

import torch

from anyshard.trainer.data.agreement import _message, digest


def batch() -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.arange(12).view(2, 6),
        "pixels": torch.linspace(0, 1, 8),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "flag": torch.tensor([True, False]),
    }


def test_equal_batches_have_one_digest() -> None:
    assert digest([batch(), batch()]) == digest([batch(), batch()])
    assert digest([batch()]).dtype == torch.int64
    assert digest([]) == 0


def test_every_change_is_seen() -> None:
    expected = int(digest([batch()]))
    seen = {expected}
    for name, value in batch().items():
        for place in range(value.numel()):
            changed = batch()
            flat = changed[name].view(-1)
            flat[place] = ~flat[place] if name == "flag" else flat[place] + 1
            seen.add(int(digest([changed])))
    assert len(seen) == 1 + sum(value.numel() for value in batch().values())
    swapped = batch() | {"input_ids": batch()["input_ids"].flip(0)}
    assert int(digest([swapped])) not in seen
    renamed = {("labels" if name == "input_ids" else name): value for name, value in batch().items()}
    assert digest([renamed]) != expected
    assert digest([batch(), swapped]) != digest([swapped, batch()])


def test_the_error_names_the_ranks() -> None:
    told = _message([[0, 2, 3], [1]], 101)
    assert told.startswith("at step 101 the data loader gave some samples to ranks 0, 2, 3 and others to rank 1, which")
