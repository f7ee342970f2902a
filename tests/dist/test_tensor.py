"""Models split over ranks against the whole model: outputs, and the gradient of every parameter, of each architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.models import SMALL, SPLIT_ONLY, small_config
from helpers.ranks import run_ranks
from torch import nn

pytestmark = pytest.mark.dist

FAMILIES = [*SMALL, *SPLIT_ONLY]


def _built(config: Any, groups: Any) -> nn.Module:
    from anyshard.trainer.models.hf import build

    return build(config, device=torch.device("cpu"), dtype=torch.float32, groups=groups)


def _gradients(model: nn.Module, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens_BS = torch.randint(0, 272, (2, 17), generator=generator)
    logits = model(input_ids=tokens_BS[:, :-1], use_cache=False).logits
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens_BS[:, 1:].flatten())
    loss.backward()
    return logits.detach(), loss.detach()


def _differences(family: str, tp: int, changes: dict[str, Any]) -> dict[str, Any]:
    """On a rank: how far the split model is from the whole one, and what every parameter became."""
    import torch.distributed as dist

    from anyshard.parallel.groups import create_groups
    from anyshard.parallel.part import part_of
    from anyshard.parallel.topology import Mesh

    config = small_config(family)
    config.model.config = config.model.config | changes
    if family == "gemma2":
        config.model.attention = "eager"  # it has no other
    groups = create_groups(Mesh(dp=dist.get_world_size() // tp, tp=tp), dist.get_rank())
    whole, split = _built(config, None), _built(config, groups)
    expected, loss = _gradients(whole, 1)
    logits, split_loss = _gradients(split, 1)
    global_params = dict(whole.named_parameters())
    least = 1e-3 * max(float(param.grad.abs().max()) for param in global_params.values())  # keys' biases have none
    far, covered, cut = {}, {name: torch.zeros(p.shape, dtype=torch.int64) for name, p in global_params.items()}, 0
    for name, param in split.named_parameters():
        part = part_of(param)
        canonical = name if part is None else part.name
        region = tuple(slice(*side) for side in part.box) if part else ()
        cut += part is not None
        mine, theirs = global_params[canonical][region], global_params[canonical].grad[region]
        assert torch.equal(param, mine), f"{name} starts from other values"
        far[name] = float((param.grad - theirs).abs().max() / theirs.abs().max().clamp(min=least))
        covered[canonical][region] += 1
    for count in covered.values():
        dist.all_reduce(count, group=groups.tp)
    assert all(bool((count > 0).all()) for count in covered.values()), "a parameter is not held in full"
    return {
        "logits": float((logits - expected).abs().max() / expected.abs().max()),
        "loss": float((split_loss - loss).abs() / loss),
        "gradients": max(far.items(), key=lambda item: item[1]),
        "cut": cut,
        "numel": sum(param.numel() for param in split.parameters()) / sum(param.numel() for param in whole.parameters()),
    }


def _check(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["logits"] < 1e-5
        assert rank["loss"] < 1e-6
        assert rank["gradients"][1] < 2e-5, rank["gradients"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_gradient_is_that_of_the_whole_model(family: str) -> None:
    found = run_ranks(_differences, 2, family=family, tp=2, changes={})
    _check(found)
    assert all(rank["numel"] < 0.8 for rank in found) or family == "mixtral"  # experts stay whole


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"vocab_size": 273, "intermediate_size": 131}),  # neither divides by 2
        (
            "llama",
            {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48, "head_dim": 8},
        ),  # two key-value heads here, one there
        ("llama", {"num_key_value_heads": 1}),  # both ranks hold the same one
        ("qwen3", {"num_key_value_heads": 1}),
        ("qwen3", {"tie_word_embeddings": False}),
        ("gpt2", {"n_head": 2, "vocab_size": 273}),
    ],
)
def test_sizes_that_do_not_divide(family: str, changes: dict[str, Any]) -> None:
    _check(run_ranks(_differences, 2, family=family, tp=2, changes=changes))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_more_ranks_than_key_value_heads(family: str) -> None:
    _check(run_ranks(_differences, 4, family=family, tp=4, changes={}))


def test_replicas_of_a_split_model() -> None:
    _check(run_ranks(_differences, 4, family="qwen3", tp=2, changes={}))
