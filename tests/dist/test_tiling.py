"""Loss and feed-forward blocks in tiles: the same losses, and never the logits or the inside of a block for all tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.fitting import curve
from helpers.models import SMALL, SPLIT_ONLY, small_config
from torch.utils._python_dispatch import TorchDispatchMode

from anyshard.configs.errors import ConfigError
from anyshard.trainer.lm import IGNORE, Manner, causal_lm_loss
from anyshard.trainer.models.hf import build

pytestmark = pytest.mark.dist

BASE = [
    "train.max_steps=10",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    "train.max_grad_norm=0.8",
    "optimizer.weight_decay=0.1",
    "model.config.tie_word_embeddings=true",
]
TILES = ["train.loss_tile_tokens=24", "train.mlp_tile_tokens=40"]  # neither divides 2 x 64 tokens
LAYOUTS = {
    "dp2z1": (["zero=z1"], 2),
    "dp2z2": (["zero=z2"], 2),
    "dp2z3": (["zero=z3"], 2),
    "tp2z1": (["zero=z1", "parallel.tp=2"], 2),
    "tp2z3": (["zero=z3", "parallel.tp=2"], 2),
    "sp2z2": (["zero=z2", "parallel.sp=2"], 2),
    "sp2z3": (["zero=z3", "parallel.sp=2"], 2),
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return curve(tmp_path_factory.mktemp("reference"), [*BASE, "zero=z0"], 1)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tiles_change_nothing(tmp_path: Any, reference: list[float], layout: str) -> None:
    options, ranks = LAYOUTS[layout]
    recompute = "train.activation_checkpointing=true"
    assert curve(tmp_path, [*BASE, *TILES, *options, recompute], ranks) == pytest.approx(reference, rel=1e-5)


class _Largest(TorchDispatchMode):
    """Remembers the most elements of any tensor with a last dimension of this size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.rows = width, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, torch.Tensor) and each.dim() > 1 and each.shape[-1] == self.width:
                self.rows = max(self.rows, each.numel() // self.width)
        return result


def _rows(family: str, width: int, *, loss: int | None, mlp: int | None) -> tuple[int, float, list[torch.Tensor]]:
    """The most rows of this width, the loss and the gradients of a micro-batch of 2 x 60 tokens."""
    config = small_config(family)
    config.train.mlp_tile_tokens = mlp
    model = build(config, device=torch.device("cpu"), dtype=torch.float32)
    tokens_BS = torch.randint(0, 272, (2, 61), generator=torch.Generator().manual_seed(1))
    labels_BS = tokens_BS[:, 1:].clone()
    labels_BS[1, :9] = IGNORE
    with _Largest(width) as largest:
        value = causal_lm_loss(model, {"input_ids": tokens_BS[:, :-1], "labels": labels_BS}, Manner(tile_tokens=loss))
        value.backward()
    return largest.rows, float(value.detach()), [param.grad for param in model.parameters()]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma", "phi", "gpt_neox", "opt", "qwen2"])
def test_logits_exist_for_one_tile_only(family: str) -> None:
    """The head itself, transposed, has 64 rows of the vocabulary's width; the tile has 7."""
    whole, value, gradients = _rows(family, 272, loss=None, mlp=None)
    tiled, other, others = _rows(family, 272, loss=7, mlp=None)
    assert whole == 120
    assert tiled == 64
    assert other == pytest.approx(value, rel=1e-6)
    for mine, theirs in zip(gradients, others, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=1e-7)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma", "phi", "gpt_neox", "qwen2"])
def test_the_inside_of_a_block_exists_for_one_tile_only(family: str) -> None:
    width = 256 if family == "gpt2" else 128
    whole, value, gradients = _rows(family, width, loss=None, mlp=None)
    tiled, other, others = _rows(family, width, loss=None, mlp=13)
    assert whole == 120
    assert tiled == 64  # the weights have as many rows of this width
    assert other == pytest.approx(value, rel=1e-6)
    for mine, theirs in zip(gradients, others, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("family", "told"), [("mixtral", "routes its tokens to experts"), ("opt", "has no module of the names mlp")]
)
def test_blocks_that_cannot_be_tiled_are_refused(family: str, told: str) -> None:
    config = small_config(family)
    config.train.mlp_tile_tokens = 8
    with pytest.raises(ConfigError, match=told):
        build(config, device=torch.device("cpu"), dtype=torch.float32)


def test_models_that_compute_with_their_logits_are_refused() -> None:
    config = small_config("gemma2")
    config.model.attention = "eager"
    assert {"gemma2"} <= {*SMALL, *SPLIT_ONLY}
    model = build(config, device=torch.device("cpu"), dtype=torch.float32)
    tokens_BS = torch.zeros((1, 4), dtype=torch.int64)
    with pytest.raises(ConfigError, match=r"train\.loss_tile_tokens=2: the model computes with its logits"):
        causal_lm_loss(model, {"input_ids": tokens_BS, "labels": tokens_BS}, Manner(tile_tokens=2))
