"""Models split over ranks against the whole model: outputs, and the gradient of every parameter, of each architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.models import SMALL, SPLIT_ONLY, small_config
from helpers.ranks import run_ranks
from helpers.sampling import some
from torch import nn

pytestmark = pytest.mark.dist

FAMILIES = [*SMALL, *SPLIT_ONLY]
ALWAYS = [*SMALL, *some(list(SPLIT_ONLY), 3)]


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


@pytest.mark.parametrize(
    "family", [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_every_gradient_is_that_of_the_whole_model(family: str) -> None:
    found = run_ranks(_differences, 2, family=family, tp=2, changes={})
    _check(found)
    assert all(rank["numel"] < 0.8 for rank in found) or family == "mixtral"  # experts stay whole


@pytest.mark.sampled(3)
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


def _count_all_reduces() -> int:
    """On a rank: all-reduces of a forward and backward pass of three layers."""
    import torch.distributed as dist
    from torch.utils._python_dispatch import TorchDispatchMode

    from anyshard.parallel.groups import create_groups
    from anyshard.parallel.topology import Mesh

    class Count(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.number += func._schema.name == "c10d::allreduce_"
            return func(*args, **(kwargs or {}))

    split = _built(small_config("llama"), create_groups(Mesh(dp=1, tp=2), dist.get_rank()))
    with Count() as count:
        _gradients(split, 1)
    return count.number


def test_four_all_reduces_a_layer() -> None:
    """And one for the embedding and one for the head: layers that read the same share that of their input's gradient."""
    assert run_ranks(_count_all_reduces, 2) == [4 * 3 + 2] * 2


def _split_vocabulary(separate: bool) -> dict[str, Any]:
    """On a rank: loss and gradients where no rank sees all logits, and how many it sees."""
    import torch.distributed as dist

    from anyshard.parallel.groups import create_groups
    from anyshard.parallel.part import part_of
    from anyshard.parallel.topology import Mesh
    from anyshard.trainer.lm import IGNORE, causal_lm_loss, full_lm_loss

    config = small_config("qwen3")
    config.model.config = config.model.config | {"vocab_size": 273}
    whole, split = _built(config, None), _built(config, create_groups(Mesh(dp=1, tp=2), dist.get_rank()))
    widths = []
    split.lm_head.register_forward_hook(lambda module, args, output: widths.append(output.shape[-1]))
    tokens_BS = torch.randint(0, 273, (2, 17), generator=torch.Generator().manual_seed(3))
    labels_BS = tokens_BS[:, 1:].clone()
    loss_fn = full_lm_loss
    if separate:
        loss_fn, labels_BS[0, 3:7] = causal_lm_loss, IGNORE
    batch = {"input_ids": tokens_BS[:, :-1], "labels": labels_BS}
    losses = [loss_fn(model, batch) for model in (whole, split)]
    for loss in losses:
        loss.backward()
    part = part_of(split.lm_head.weight)
    assert part is not None
    expected = whole.lm_head.weight.grad[tuple(slice(*side) for side in part.box)]
    with torch.no_grad():
        full = split(input_ids=batch["input_ids"], use_cache=False).logits.shape[-1]
    return {
        "loss": float((losses[1] - losses[0]).abs() / losses[0]),
        "gradient": float((split.lm_head.weight.grad - expected).abs().max() / expected.abs().max()),
        "widths": widths,
        "full": full,
    }


@pytest.mark.parametrize("separate", [False, True])
def test_no_rank_sees_all_logits_of_the_loss(separate: bool) -> None:
    found = run_ranks(_split_vocabulary, 2, separate=separate)
    for rank in found:
        assert rank["loss"] < 1e-6
        assert rank["gradient"] < 1e-5
        assert rank["full"] == 273  # whoever samples text sees all
    assert [rank["widths"][0] for rank in found] == [137, 136]


def _pretrained(path: str) -> float:
    """On a rank: the largest difference of a loaded and split model's parameters from those in the file."""
    import torch.distributed as dist
    from safetensors.torch import load_file

    from anyshard.configs.schema import Init
    from anyshard.parallel.groups import create_groups
    from anyshard.parallel.part import part_of
    from anyshard.parallel.topology import Mesh

    config = small_config("gpt2", path=path, init=Init.pretrained, config={})
    split = _built(config, create_groups(Mesh(dp=1, tp=2), dist.get_rank()))
    stored = load_file(f"{path}/model.safetensors")
    worst = 0.0
    for name, param in split.named_parameters():
        part = part_of(param)
        whole = stored[name if part is None else part.name]
        region = ... if part is None else tuple(slice(*side) for side in part.box)
        worst = max(worst, float((param - whole[region]).abs().max()))
    return worst


def test_pretrained_weights_are_split_as_they_are_read(tmp_path: Any) -> None:
    from transformers import GPT2LMHeadModel

    whole = _built(small_config("gpt2"), None)
    assert isinstance(whole, GPT2LMHeadModel)
    whole.save_pretrained(tmp_path)
    assert run_ranks(_pretrained, 2, path=str(tmp_path)) == [0.0, 0.0]
