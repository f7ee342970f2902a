"""Loss and feed-forward blocks for a tile of tokens at a time, so that what they need at once does not grow with the sequence.

Logits are vocabulary / hidden size times as large as what they are made of, the inside of a feed-forward block several times.
Here both exist for one tile only: the backward pass computes them again, tile by tile.

Source: ALST, arXiv 2506.13996, section 3.1; deepspeed 0.19.8 runtime/sequence_parallel/ulysses_sp.py, `TiledMLP` and
`TiledFusedLogitsLoss`. The latter computes the gradients in its forward pass, before gradient accumulation and loss scaling
have scaled the loss, and would have to be told of both; checkpoints of torch are one graph, which ZeRO sees as any other.

Shape suffixes: B sequences, T tokens of each, N tokens, D features, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from anyshard.configs.errors import ConfigError, Problem
from anyshard.parallel import vocabulary
from anyshard.parallel.zero3 import gather_as_one

BLOCKS = ("mlp", "feed_forward", "ffn")
"""What architectures call the feed-forward block of a layer."""

Losses = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(logits_NV, targets_N) -> losses_N in float32."""


class TiledHead:
    """While it lasts an output head gives the loss of every token in the place of its logits.

    Args:
        losses: of a tile of logits and its targets.
        tile_tokens: whose logits exist at once.

    Shape: the head is given [B, T, D] and gives [B, T].
    """

    def __init__(self, head: Any, targets_BT: torch.Tensor, losses: Losses, tile_tokens: int) -> None:
        self._head, self._targets_BT, self._losses, self._tile_tokens = head, targets_BT, losses, tile_tokens
        self._plain = head.forward
        self._made = 0

    def __enter__(self) -> TiledHead:
        self._head.forward = self._forward
        return self

    def __exit__(self, *error: object) -> None:
        self._head.forward = self._plain

    def _forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        hidden = torch.split(hidden_BTD.flatten(0, 1), self._tile_tokens)
        targets = torch.split(self._targets_BT.flatten(), self._tile_tokens)
        parts = [
            checkpoint(self._tile, *each, use_reentrant=False, preserve_rng_state=False)
            for each in zip(hidden, targets, strict=True)
        ]
        losses_BT = torch.cat(parts).view(self._targets_BT.shape)
        self._made = losses_BT.data_ptr()
        return losses_BT

    def _tile(self, hidden_ND: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        # here and not around the model: the backward pass comes here again
        split = getattr(self._head, "gather_output", False)
        with vocabulary.local_logits(self._head) if split else contextlib.nullcontext():
            logits_NV = self._plain(hidden_ND)
        return self._losses(logits_NV, targets_N)

    def losses(self, output: Any) -> torch.Tensor:
        """What the model gave in the place of logits. Shape: [B, T].

        Raises:
            ConfigError: it computed something else of them, as models that scale or cap their logits do.
        """
        losses_BT: torch.Tensor = output.logits
        if losses_BT.data_ptr() != self._made:
            reason = "the model computes with its logits (it scales or caps them) after the output head."
            problem = Problem("train.loss_tile_tokens", self._tile_tokens, reason, "Set train.loss_tile_tokens=null.")
            raise ConfigError(problem)
        return losses_BT


def tile_blocks(model: nn.Module, tile_tokens: int, model_name: str) -> None:
    """Have every feed-forward block of a model compute a tile of tokens at a time.

    Raises:
        ConfigError: none can be found, or they route tokens to experts.
    """
    found = [module for name, module in model.named_modules() if name.rpartition(".")[2] in BLOCKS]
    routed = [block for block in found if any("expert" in name or "router" in name for name, _ in block.named_modules())]
    if routed or not found:
        why = "routes its tokens to experts" if routed else f"has no module of the names {', '.join(BLOCKS)}"
        fix = "Set train.mlp_tile_tokens=null; train.activation_checkpointing=true saves memory in any model."
        raise ConfigError(Problem("train.mlp_tile_tokens", tile_tokens, f"the model {model_name} {why}.", fix))
    gather_as_one(model, found)  # and not for each tile
    for block in found:
        block.forward = functools.partial(_in_tiles, block.forward, tile_tokens)


def _in_tiles(forward: Callable[[torch.Tensor], torch.Tensor], tile_tokens: int, x_BTD: torch.Tensor) -> torch.Tensor:
    tiles = torch.split(x_BTD.flatten(0, 1)[None], tile_tokens, dim=1)
    return torch.cat([checkpoint(forward, tile, use_reentrant=False) for tile in tiles], dim=1).view(x_BTD.shape)
