"""Which parameters decay.

Weight decay applies to parameters of two or more dimensions that are not embeddings: matrices of projections, routers and
experts. Biases, norms and other vectors never decay. `optimizer.decay_embeddings` adds the embeddings, and the output head
where it is tied to one (an untied head is a projection and decays).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from anyshard.configs import schema


def param_groups(
    named: Iterable[tuple[str, nn.Parameter]], optimizer: schema.Optimizer, embedding_names: set[str]
) -> list[dict[str, Any]]:
    """The groups "decay" and "no_decay" of the trainable parameters; a group without parameters is left out.

    Args:
        named: names and parameters, each parameter once (as `named_parameters` gives them).
        embedding_names: names of the parameters that are embeddings.

    Returns:
        Groups with the keys params, name, param_names (in the order of params), lr and weight_decay.
    """
    groups: dict[str, dict[str, Any]] = {
        name: {"params": [], "name": name, "param_names": [], "lr": optimizer.lr, "weight_decay": weight_decay}
        for name, weight_decay in (("decay", optimizer.weight_decay), ("no_decay", 0.0))
    }
    for name, param in named:
        if not param.requires_grad:
            continue
        shape = getattr(param, "ds_shape", param.shape)  # a parameter that ZeRO-3 partitioned is flat and empty itself
        decays = len(shape) >= 2 and (optimizer.decay_embeddings or name not in embedding_names)
        group = groups["decay" if decays else "no_decay"]
        group["params"].append(param)
        group["param_names"].append(name)
    return [group for group in groups.values() if group["params"]]
