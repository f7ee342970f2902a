"""Which parameters decay."""

from __future__ import annotations

import torch
from torch import nn

from anyshard.configs import schema
from anyshard.trainer.optim.groups import param_groups


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.proj = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.experts = nn.Parameter(torch.zeros(2, 4, 4))
        self.head = nn.Linear(4, 8, bias=False)


def _names(model: nn.Module, **keys: object) -> dict[str, list[str]]:
    optimizer = schema.Optimizer(lr=0.5, weight_decay=0.3, **keys)  # type: ignore[arg-type]
    groups = param_groups(model.named_parameters(), optimizer, {"embed.weight"})
    for group in groups:
        assert group["lr"] == 0.5
        assert group["weight_decay"] == (0.3 if group["name"] == "decay" else 0.0)
        by_name = dict(model.named_parameters())
        assert all(by_name[name] is param for name, param in zip(group["param_names"], group["params"], strict=True))
    return {group["name"]: group["param_names"] for group in groups}


def test_matrices_decay_and_vectors_and_embeddings_do_not() -> None:
    assert _names(_Model()) == {
        "decay": ["experts", "proj.weight", "head.weight"],
        "no_decay": ["embed.weight", "proj.bias", "norm.weight", "norm.bias"],
    }


def test_embeddings_decay_where_asked() -> None:
    assert "embed.weight" in _names(_Model(), decay_embeddings=True)["decay"]


def test_a_tied_head_is_an_embedding() -> None:
    model = _Model()
    model.head.weight = model.embed.weight
    assert _names(model)["decay"] == ["experts", "proj.weight"]


def test_frozen_parameters_are_in_no_group() -> None:
    model = _Model()
    model.proj.requires_grad_(False)
    assert not any("proj" in name for names in _names(model).values() for name in names)


def test_an_empty_group_is_left_out() -> None:
    assert _names(nn.LayerNorm(4)) == {"no_decay": ["weight", "bias"]}


def test_the_shape_of_a_partitioned_parameter_counts() -> None:
    model = nn.Linear(4, 4, bias=False)
    model.weight.ds_shape = model.weight.shape  # type: ignore[assignment]
    model.weight.data = torch.empty(0)
    assert _names(model) == {"decay": ["weight"]}
