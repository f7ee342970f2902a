"""What sequence parallelism does without ranks: cutting batches, and refusing what it cannot divide."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from anyshard.configs.errors import ConfigError
from anyshard.parallel import sequence
from anyshard.parallel.groups import Groups
from anyshard.parallel.sequence import Stretch, WholeMask, computing, stretch_of
from anyshard.parallel.topology import Mesh

GROUP: Any = SimpleNamespace(group_name="none")  # nothing here communicates


def stretches(length: int, sp: int, positions: torch.Tensor | None = None) -> list[Stretch]:
    ids = torch.zeros((2, length), dtype=torch.int64)
    return [stretch_of(ids, positions, Groups(Mesh(dp=1, sp=sp), rank, sp=GROUP)) for rank in range(sp)]


@pytest.mark.parametrize(("length", "sp"), [(8, 2), (9, 2), (7, 4), (1, 4)])
def test_the_stretches_are_the_sequence(length: int, sp: int) -> None:
    whole = torch.arange(2 * length).view(2, length)
    parts = [stretch.cut(whole, -100) for stretch in stretches(length, sp)]
    assert len({part.shape for part in parts}) == 1
    joined = torch.cat(parts, dim=1)
    assert torch.equal(joined[:, :length], whole)
    assert torch.all(joined[:, length:] == -100)
    assert joined.shape[1] - length < sp


def test_positions_count_on_over_the_padding() -> None:
    documents = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]])
    for stretch in stretches(5, 4, documents):
        assert stretch.positions_BS.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4], [0, 0, 1, 2, 3, 4, 5, 6]]
    assert stretches(5, 2)[0].positions_BS.tolist() == [[0, 1, 2, 3, 4, 5]] * 2


def test_attention_that_cannot_be_divided_is_refused() -> None:
    stretch, attend = stretches(4, 2)[0], sequence._attention("sdpa")
    heads = torch.zeros((2, 2, 2, 4))
    with computing(stretch), pytest.raises(ConfigError, match="does not take the mask that transformers made"):
        attend(nn.Identity(), heads, heads, heads, None)
    with pytest.raises(ConfigError, match="Identity cannot be split along the sequence: it is given s_aux"):
        attend(nn.Identity(), heads, heads, heads, WholeMask(stretch, None), s_aux=torch.zeros(2))


def test_without_a_stretch_attention_is_the_original() -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    query, key, value = torch.randn((3, 1, 4, 6, 8), generator=torch.Generator().manual_seed(0))
    module = nn.Identity()
    expected, _ = sdpa_attention_forward(module, query, key, value, None)
    found, _ = sequence._attention("sdpa")(module, query, key, value, None)
    assert torch.equal(found, expected)


def test_convolutions_are_refused() -> None:
    config = SimpleNamespace(num_attention_heads=4, num_key_value_heads=4, _attn_implementation="sdpa")
    groups = Groups(Mesh(dp=1, sp=2), 0, sp=GROUP)
    problem = sequence._problem(nn.Sequential(nn.Conv1d(1, 1, 3)), config, groups, "mine")
    assert problem is not None
    assert "it has convolutions or recurrent layers" in problem.reason
