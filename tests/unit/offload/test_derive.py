"""Sub-groups and buffers that follow from a model's parts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyshard.offload.derive import (
    FP32_BYTES,
    MIB,
    OVERLAPS,
    Aio,
    DoesNotFitError,
    derive_optimizer,
    derive_params,
    live_params,
    part,
    sub_group_for_params,
    sub_groups,
)

AIO = Aio()
PARTS = st.lists(st.integers(1, 3_000_000), min_size=1, max_size=30)


@given(PARTS, st.integers(1, 10_000_000))
def test_sub_groups_hold_every_part_once_in_order(parts, size):
    cut = sub_groups(parts, size)
    assert [numel for group in cut for numel in group] == parts
    assert all(sum(group[:-1]) < size for group in cut) or cut == [parts]


@given(st.lists(PARTS, min_size=1, max_size=3), st.sampled_from(sorted(OVERLAPS)), st.integers(0, 2))
def test_buffers_keep_to_their_budget_and_hold_the_largest_sub_group(groups, overlap, num_states):
    budget = 300 * MIB
    options = {"num_states": num_states, "overlap": overlap, "aio": AIO, "max_sub_group": 10**9}
    try:
        swap = derive_optimizer(groups, budget_bytes=budget, **options)
    except DoesNotFitError as error:
        needed = error.needed_bytes
    else:
        needed = 0
    if needed:
        assert needed > budget
        assert derive_optimizer(groups, budget_bytes=needed, **options).pinned_bytes <= needed
        return
    assert swap.pinned_bytes <= budget
    cut = [sum(each) for group in groups for each in sub_groups(group, swap.sub_group_elements)]
    assert max(cut) * FP32_BYTES <= swap.buffer_bytes
    kept = sum(numel for numel in cut if numel * FP32_BYTES < MIB)
    assert swap.memory_bytes == kept * FP32_BYTES * (num_states + 1)
    assert swap.nvme_bytes >= (sum(cut) - kept) * FP32_BYTES * (num_states + 1)


def test_overlap_costs_buffers():
    counts = {
        overlap: derive_optimizer(
            [[1_000_000] * 8], num_states=2, overlap=overlap, budget_bytes=512 * MIB, aio=AIO, max_sub_group=2_000_000
        ).buffer_count
        for overlap in OVERLAPS
    }
    assert counts == {"none": 4, "read": 8, "write": 8, "both": 12}


def test_what_a_person_asked_for_is_an_upper_bound():
    swap = derive_optimizer([[10] * 9], num_states=2, overlap="none", budget_bytes=MIB, aio=AIO, max_sub_group=20)
    assert (swap.sub_group_elements, swap.num_groups, swap.num_swapped) == (20, 5, 0)


def test_parts_of_a_parameter():
    assert (part(10, 1), part(10, 4)) == (10, 3)


def test_parameters_of_a_module_and_its_parents_are_held_together():
    names = {
        "embed.weight": MIB,
        "embed.inner.weight": MIB,
        "embed.inner.bias": 10,
        "head.weight": MIB,
        "embeds.weight": MIB,
    }
    assert live_params(names, 4, AIO) == 2


@given(PARTS, st.integers(1, 4))
def test_what_is_stepped_goes_back_through_the_buffer_that_deepspeed_reserves(parts, dp):
    size = sub_group_for_params([parts], 10**9, dp=dp, element_bytes=2, budget_bytes=64 * MIB, aio=AIO)
    names = {f"m{number}.weight": numel for number, numel in enumerate(parts)}
    swap = derive_params(names, [parts], dp=dp, element_bytes=2, sub_group_elements=size, aio=AIO)
    for group in sub_groups(parts, size):
        written = [-(-numel * 2 // 1024) * 1024 for numel in group if numel * 2 >= MIB]
        assert sum(written) <= swap.reserve_bytes
    assert swap.buffer_elements >= max((numel for numel in parts if numel * 2 >= MIB), default=0)
    assert swap.memory_bytes == sum(2 * numel for numel in parts if numel * 2 < MIB)


def test_blocks_larger_than_what_is_swapped_are_a_mistake():
    with pytest.raises(AssertionError):
        Aio(block_bytes=2 * MIB)
