"""What a stage keeps, what stands in for the rest, and DeepSpeed's picture of our mesh."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers.models import small_config
from torch import nn

from anyshard.configs.errors import ConfigError
from anyshard.configs.schema import Parallel
from anyshard.parallel.groups import Groups
from anyshard.parallel.pipeline import Never, Same, Zero, divide, keep_stage, topology_of
from anyshard.parallel.topology import AXES, Mesh
from anyshard.trainer.models.hf import build


def on_meta(family: str) -> nn.Module:
    return build(small_config(family), device=torch.device("meta"), dtype=torch.float32)


@pytest.mark.parametrize("order", list(itertools.permutations(AXES)))
def test_deepspeed_numbers_the_ranks_as_we_do(order: tuple[str, ...]) -> None:
    mesh = Mesh(dp=2, tp=3, pp=2, order=order)
    topology = topology_of(mesh)
    for rank in range(mesh.world_size):
        coordinates = topology.get_coord(rank)
        ours = mesh.coordinates(rank)
        assert (coordinates.pipe, coordinates.data, coordinates.model) == (ours["pp"], ours["dp"], ours["tp"])


def test_stages_hold_every_parameter_once_but_the_shared_embedding() -> None:
    held: list[set[str]] = []
    stages = divide(on_meta("gpt2"), Parallel(pp=3), "gpt2")
    for stage in range(3):
        model = on_meta("gpt2")
        whole = keep_stage(model, stages, stage)
        held.append({name for name, _ in model.named_parameters()})
        assert whole.tied == {"lm_head.weight": "transformer.wte.weight"}
        assert whole.copies == (frozenset({"transformer.wte.weight"}) if stage == 2 else frozenset())
        assert sum(param.numel() for param in model.parameters()) == stages.sizes[stage]
    assert set.union(*held) == set(whole.params)
    assert held[0] & held[2] == {"transformer.wte.weight"}
    assert not held[0] & held[1]
    assert not held[1] & held[2]


def test_stand_ins() -> None:
    hidden = torch.ones(2, 3, dtype=torch.bfloat16)
    assert Same()(hidden, attention_mask=None) is hidden
    assert (hidden + Zero()(torch.arange(3))).dtype == torch.bfloat16
    with pytest.raises(AssertionError, match=r"correct parallel/stages\.yaml"):
        Never()(hidden)


def test_what_is_no_hugging_face_model() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.pp=2: Linear is no Hugging Face model\. Set parallel\.pp=1\."):
        divide(nn.Linear(1, 1), Parallel(pp=2), "mine")


def test_experts_are_balanced_over_all_layers_together() -> None:
    model = on_meta("mixtral")
    model.config.output_router_logits = True
    with pytest.raises(ConfigError, match="balances experts is over the layers of all stages together"):
        divide(model, Parallel(pp=2), "small")


def test_more_stages_than_layers() -> None:
    with pytest.raises(ConfigError, match="has 3 layers, and every stage needs one"):
        divide(on_meta("llama"), Parallel(pp=4), "small")


def test_stages_of_one_pipeline_draw_other_random_numbers() -> None:
    mesh = Mesh(dp=2, tp=2, pp=2)
    streams = [Groups(mesh, rank).stream for rank in range(8)]
    assert streams == [(0, 0), (0, 0), (0, 1), (0, 1), (1, 0), (1, 0), (1, 1), (1, 1)]
    assert Groups(Mesh(dp=2, tp=2), 2).stream == (1,)
