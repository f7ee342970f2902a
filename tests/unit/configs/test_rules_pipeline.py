"""What a pipeline does not go with, and what each refusal names instead."""

from __future__ import annotations

import pytest

from anyshard.configs.compose import compose
from anyshard.configs.rules import check

PP2 = ["parallel.pp=2", "launch.procs_per_node=4", "precision=fp32"]


@pytest.mark.parametrize("overrides", [["zero=z0"], ["zero=z1"], ["zero=z1", "parallel.tp=2"], ["zero=z1", "offload=cpu"]])
def test_legal(overrides: list[str]) -> None:
    assert check(compose([*PP2, *overrides])) == []
    assert check(compose([*PP2, *overrides, "parallel.pp_layers=[3,1]"])) == []


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["zero=z2"], ["zero.stage=2", "parallel.pp=2", "Use zero=z1"]),
        (["zero=z3"], ["zero.stage=3", "parallel.tp instead"]),
        (["zero=z1", "parallel.sp=2"], ["parallel.sp=2", "Set parallel.sp=1, or parallel.pp=1"]),
        (["zero=z1", "+model.config.output_router_logits=true"], ["output_router_logits=true", "Set it to false"]),
        (["zero=z1", "offload=nvme", "offload.nvme_path=/x"], ["offload.optimizer=nvme", "Use offload=cpu"]),
        (["zero=z1", "parallel.pp_layers=[1,2,1]"], ["3 numbers for parallel.pp=2", "or null"]),
        (["zero=z1", "parallel.pp_layers=[4,0]"], ["every stage needs a layer"]),
        (["zero=z1", "+model.config.output_router_logits=true"], ["layers of all stages together", "or parallel.pp=1"]),
        (["zero=z1", "+deepspeed_extra.data_types.grad_accum_dtype=bf16"], ["shared embeddings", "Remove it"]),
    ],
)
def test_refused(overrides: list[str], said: list[str]) -> None:
    told = "\n".join(map(str, check(compose([*PP2, *overrides]))))
    for words in said:
        assert words in told


def test_layers_by_hand_need_a_pipeline() -> None:
    (problem,) = check(compose(["parallel.pp_layers=[2,2]", "launch.procs_per_node=1"]))
    assert "2 numbers for parallel.pp=1" in str(problem)
