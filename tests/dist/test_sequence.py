"""Models whose ranks share each sequence against the model alone: loss, and every gradient, of each architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.models import SMALL, SPLIT_ONLY, small_config
from helpers.ranks import run_ranks

pytestmark = pytest.mark.dist

NO_MASK = ("gemma2",)  # soft-capped scores: eager attention only
FAMILIES = [family for family in [*SMALL, *SPLIT_ONLY] if family not in NO_MASK]


def _batch(length: int, documents: bool) -> dict[str, torch.Tensor]:
    from anyshard.trainer.lm import IGNORE

    tokens_BS = torch.randint(0, 272, (2, length + 1), generator=torch.Generator().manual_seed(1))
    labels_BS = tokens_BS[:, 1:].clone()
    labels_BS[0, 2:5] = IGNORE  # ranks have different numbers of targets
    batch = {"input_ids": tokens_BS[:, :-1], "labels": labels_BS}
    if documents:
        starts = torch.tensor([[0, 5, 11], [0, 9, 10]])
        positions = torch.arange(length)
        begun = torch.stack([(positions[None] >= row[:, None]).sum(0) - 1 for row in starts])
        batch["position_ids"] = positions - starts.gather(1, begun)
    return batch


def _differences(family: str, sp: int, length: int, documents: bool, changes: dict[str, Any], tp: int = 1) -> dict[str, Any]:
    """On a rank: how far loss and gradients of the ranks together are from those of the whole model on whole sequences."""
    import torch.distributed as dist

    from anyshard.parallel.groups import create_groups
    from anyshard.parallel.part import part_of
    from anyshard.parallel.topology import Mesh
    from anyshard.trainer.lm import causal_lm_loss, count_in_stretch, count_targets, in_stretches
    from anyshard.trainer.models.hf import build

    config = small_config(family)
    config.model.config = config.model.config | {"attention_dropout": 0.0} | changes
    if family == "gpt2":
        config.model.config.pop("attention_dropout")
    config.train.activation_checkpointing = "recompute" in changes
    config.model.config.pop("recompute", None)
    groups = create_groups(Mesh(dp=1, tp=tp, sp=sp), dist.get_rank())
    batch = _batch(length, documents)
    whole = build(config, device=torch.device("cpu"), dtype=torch.float32)
    part = build(config, device=torch.device("cpu"), dtype=torch.float32, groups=groups)
    expected = causal_lm_loss(whole, batch)
    expected.backward()
    weight = count_in_stretch(groups)(batch) / count_targets(batch)
    loss = in_stretches(causal_lm_loss, groups)(part, batch) * weight
    loss.backward()
    loss = loss.detach()
    dist.all_reduce(loss, group=groups.sp)
    least = 1e-3 * max(float(param.grad.abs().max()) for param in whole.parameters() if param.grad is not None)
    references, far = dict(whole.named_parameters()), {}
    for name, param in part.named_parameters():
        box = part_of(param)
        theirs = references[name if box is None else box.name].grad
        theirs = theirs if box is None else theirs[tuple(slice(*side) for side in box.box)]
        dist.all_reduce(param.grad, group=groups.sp)
        far[name] = float((param.grad - theirs).abs().max() / theirs.abs().max().clamp(min=least))
    with torch.no_grad():
        alone = part(input_ids=batch["input_ids"][:, :7], use_cache=False).logits  # whoever samples text has whole sequences
        same = whole(input_ids=batch["input_ids"][:, :7], use_cache=False).logits
    return {
        "loss": float((loss - expected.detach()).abs() / expected.detach()),
        "gradients": max(far.items(), key=lambda item: item[1]),
        "alone": float((alone - same).abs().max()),
    }


def _check(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["loss"] < 1e-6
        assert rank["gradients"][1] < 2e-5, rank["gradients"]
        assert rank["alone"] < 1e-5


CASES = [(family, documents) for family in FAMILIES for documents in (False, True) if (family, documents) != ("opt", True)]
"""Without OPT's documents, whose positions transformers keeps from its own masks: there they see each other."""


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("family", "documents"), CASES)
def test_every_gradient_is_that_of_the_whole_sequence(family: str, documents: bool) -> None:
    """20 tokens: a sliding window of 8 (mistral) crosses the ranks, and so do documents."""
    _check(run_ranks(_differences, 2, family=family, sp=2, length=20, documents=documents, changes={}))


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("family", "length", "changes"),
    [
        ("llama", 17, {}),  # not a multiple of the ranks
        ("gemma3", 19, {"sliding_window": 6}),  # layers with and without a window
        ("llama", 20, {"num_key_value_heads": 1}),  # both ranks have the same one
        ("llama", 20, {"recompute": True}),
        ("llama", 1, {}),  # one rank has nothing but padding
    ],
)
def test_lengths_windows_and_heads(family: str, length: int, changes: dict[str, Any]) -> None:
    _check(run_ranks(_differences, 2, family=family, sp=2, length=length, documents=length > 15, changes=changes))


def test_more_ranks_than_key_value_heads() -> None:
    _check(run_ranks(_differences, 4, family="llama", sp=4, length=18, documents=True, changes={}))


def test_ranks_that_share_sequences_and_tensors() -> None:
    _check(run_ranks(_differences, 4, family="qwen3", sp=2, tp=2, length=18, documents=True, changes={}))
