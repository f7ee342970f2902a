"""The load-balancing loss of mixtures of experts: it keeps routers from choosing the same few experts.

Source: Fedus et al., "Switch Transformers", arXiv 2101.03961, eq. 4 to 6, over all layers together as transformers computes it;
counted over ranks: Qiu et al., "Demons in the Detail", arXiv 2501.11873.

Shape suffixes: N tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from anyshard.configs.schema import CountedOver
from anyshard.parallel.groups import Groups


@dataclass(frozen=True)
class Balancer:
    """Adds the loss where the model's configuration asks for it (`output_router_logits`).

    Attributes:
        groups: None where this rank's tokens are all there are.
        over: whose tokens count how often an expert is chosen.
    """

    groups: Groups | None = None
    over: CountedOver = CountedOver.micro_batch

    def loss(self, model: Any, output: Any, counted_N: torch.Tensor) -> torch.Tensor | None:
        """The weighted loss in training; None where there is none to add.

        Args:
            output: of the model, with `router_logits`.
            counted_N: tokens that count: those with a target.

        Collective: the ranks that count together call it; it blocks (a number for each expert).
        """
        routers = getattr(output, "router_logits", None)
        if not routers or not model.training:
            return None
        config = getattr(model, "module", model).config.get_text_config()
        choices_E, probabilities_E = routed(routers, config.num_experts_per_tok, counted_N)
        total = counted_N.sum() * len(routers)
        shares_E = choices_E / total.clamp(min=1)
        for group in self._groups():
            together = torch.cat([choices_E, total[None]])
            dist.all_reduce(together, group=group)
            shares_E = together[:-1] / together[-1].clamp(min=1)
        balance = len(shares_E) * (shares_E * probabilities_E / total.clamp(min=1)).sum()
        coefficient: float = config.router_aux_loss_coef
        return coefficient * balance

    def _groups(self) -> list[dist.ProcessGroup | None]:
        """The group that counts together; none where every rank counts alone. None stands for all ranks."""
        if self.groups is None:
            return []
        if self.over is CountedOver.micro_step and self.groups.num_shards > 1:
            return [self.groups.dp]
        return [] if self.groups.sp is None else [self.groups.sp]


def routed(routers: Sequence[torch.Tensor], top_k: int, counted_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How often each expert was chosen, and the sum of its probabilities, over all layers and counted tokens.

    Shape: routers [N, E] each; returns [E] twice. Only the second has a gradient.
    """
    choices_E = routers[0].new_zeros(routers[0].shape[-1], dtype=torch.float32)
    probabilities_E, counted_N = choices_E.clone(), counted_N.float()
    for logits_NE in routers:
        shares_NE = torch.softmax(logits_NE.float(), dim=-1)
        chosen = shares_NE.detach().topk(top_k, dim=-1).indices.flatten()
        choices_E = choices_E.scatter_add(0, chosen, counted_N.repeat_interleave(top_k))
        probabilities_E = probabilities_E + (shares_NE * counted_N[:, None]).sum(0)
    return choices_E, probabilities_E
