"""How a model is divided into stages."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyshard.configs.schema import Balance, Parallel
from anyshard.parallel.stages import Costs, balanced, division_of, known_types, plan_stages, stage_problems


def params(num_layers: int, *, vocabulary: int = 100) -> dict[str, int]:
    layers = {f"model.layers.{n}.mlp.up_proj.weight": 10 for n in range(num_layers)}
    return {"model.embed_tokens.weight": vocabulary, **layers, "model.norm.weight": 1}


def stages(parallel: Parallel, num_layers: int = 4, tied: dict[str, str] | None = None, **sizes: Any) -> Any:
    division = division_of("llama")
    assert division is not None
    return plan_stages(division, params(num_layers, **sizes), tied or {}, parallel, num_layers)


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=8),
    st.integers(0, 100),
    st.integers(0, 100),
    st.data(),
)
def test_no_other_cut_has_a_lighter_heaviest_stage(weights: list[int], first: int, last: int, data: Any) -> None:
    num_stages = data.draw(st.integers(1, len(weights)))

    def heaviest(bounds: tuple[int, ...]) -> int:
        loads = [sum(weights[start:stop]) for start, stop in itertools.pairwise(bounds)]
        loads[0] += first
        loads[-1] += last
        return max(loads)

    found = balanced(weights, first, last, num_stages)
    assert found[0] == 0
    assert found[-1] == len(weights)
    assert all(start < stop for start, stop in itertools.pairwise(found))
    every = itertools.combinations(range(1, len(weights)), num_stages - 1)
    assert heaviest(found) == min(heaviest((0, *cuts, len(weights))) for cuts in every)


def test_a_large_embedding_takes_the_place_of_layers() -> None:
    assert stages(Parallel(pp=2)).bounds == (0, 1, 4)
    assert stages(Parallel(pp=2), vocabulary=1).bounds == (0, 2, 4)
    assert stages(Parallel(pp=2, pp_balance=Balance.layers)).bounds == (0, 2, 4)
    assert stages(Parallel(pp=2, pp_balance=Balance.time)).bounds == (0, 2, 4)  # looked up, not multiplied with
    assert stages(Parallel(pp=3, pp_layers=[2, 1, 1])).bounds == (0, 2, 3, 4)


def test_measured_times_count_before_estimates() -> None:
    division = division_of("llama")
    assert division is not None
    parallel = Parallel(pp=2, pp_balance=Balance.time)
    tied = {"lm_head.weight": "model.embed_tokens.weight"}
    assert plan_stages(division, params(4), tied, parallel, 4).bounds == (0, 3, 4)  # the head is as heavy as ten layers
    assert plan_stages(division, params(4), tied, parallel, 4, Costs((9, 1, 1, 1), 0, 5)).bounds == (0, 1, 4)


def test_what_each_stage_holds() -> None:
    found = stages(Parallel(pp=2), tied={"lm_head.weight": "model.embed_tokens.weight"}, vocabulary=20)
    assert found.bounds == (0, 2, 4)
    assert found.sizes == (40, 41)  # the embedding is on both
    assert [found.stage_of(name) for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")] == [0, 1, 1]
    assert found.stage_of("model.layers.1.mlp.up_proj.weight") == 0
    assert found.stage_of("model.layers.2.mlp.up_proj.weight") == 1


def test_every_entry_can_be_read() -> None:
    for kind in known_types():
        division = division_of(kind)
        assert division is not None
        assert {*division.first.values(), *division.last.values()} <= {"never", "zero", "same"}
    assert division_of("unheard_of") is None


@pytest.mark.parametrize(
    ("parallel", "kind", "names", "said"),
    [
        (Parallel(pp=2), "unheard_of", [], ["type unheard_of", "add an entry 'unheard_of' to parallel/stages.yaml", "llama"]),
        (Parallel(pp=2), "llama", ["model.extra.weight"], ["model.extra.weight", "add its module"]),
        (Parallel(pp=5), "llama", [], ["parallel.pp=5", "has 4 layers", "at most 4"]),
        (Parallel(pp=3, pp_layers=[1, 1, 1]), "llama", [], ["they are 3 layers", "add up to 4, such as [1,1,2]"]),
    ],
)
def test_what_cannot_be_divided(parallel: Parallel, kind: str, names: list[str], said: list[str]) -> None:
    (problem,) = stage_problems(parallel, names, 4, "tiny", kind)
    for words in said:
        assert words in str(problem)


def test_one_stage_asks_nothing() -> None:
    assert stage_problems(Parallel(), ["x"], 4, "tiny", "unheard_of") == []
    assert stage_problems(Parallel(pp=4), params(4), 4, "tiny", "llama") == []
