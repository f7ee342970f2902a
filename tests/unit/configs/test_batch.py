from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyshard.configs.batch import BatchPlan, batch_problem, plan_batch
from anyshard.configs.errors import PlanError
from anyshard.configs.schema import Train


def test_accumulation_is_derived() -> None:
    assert plan_batch(Train(global_batch_size=48, micro_batch_size=4), dp=3) == BatchPlan(48, 4, 4, 3)


@given(st.integers(1, 300), st.integers(1, 20), st.integers(1, 16))
def test_every_sample_of_the_global_batch_has_one_place(global_batch_size: int, micro: int, dp: int) -> None:
    train = Train(global_batch_size=global_batch_size, micro_batch_size=micro)
    if batch_problem(train, dp):
        assert global_batch_size % (micro * dp) != 0
        return
    plan = plan_batch(train, dp)
    places = [
        j * (dp * micro) + rank * micro + k for j in range(plan.accumulation_steps) for rank in range(dp) for k in range(micro)
    ]
    assert sorted(places) == list(range(global_batch_size))


@pytest.mark.parametrize(
    ("global_batch_size", "micro", "dp", "said"),
    [
        (30, 4, 2, "Use train.global_batch_size=24 or 32, or train.micro_batch_size=3."),
        (3, 4, 2, "Use train.global_batch_size=8."),
        (6, 4, 2, "Use train.global_batch_size=8, or train.micro_batch_size=3."),
    ],
)
def test_a_batch_that_cannot_be_divided_names_the_nearest_that_can(
    global_batch_size: int, micro: int, dp: int, said: str
) -> None:
    with pytest.raises(PlanError) as caught:
        plan_batch(Train(global_batch_size=global_batch_size, micro_batch_size=micro), dp)
    assert said in str(caught.value)
    assert f"train.global_batch_size={global_batch_size}" in str(caught.value)
    assert caught.value.exit_code == 2


def test_the_values_that_an_error_names_work() -> None:
    for size, micro in ((24, 4), (32, 4), (30, 3)):
        assert plan_batch(Train(global_batch_size=size, micro_batch_size=micro), dp=2).accumulation_steps > 0
