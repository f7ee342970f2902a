"""Cuts of a parameter: over all ranks they hold every element, each once, or as often as heads are shared."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyshard.parallel.split import Block, Split, split_problems, valid_degrees


def heads(num_heads: int, kv_heads: int, head_dim: int) -> tuple[Block, Block]:
    """Queries and keys of attention."""
    queries = Block(num_heads * head_dim, num_heads // kv_heads * head_dim, fine=head_dim)
    return queries, Block(kv_heads * head_dim, head_dim, shared=True)


blocks = st.builds(lambda units, unit: Block(units * unit, unit), st.integers(1, 12), st.integers(1, 5))


@given(st.lists(blocks, min_size=1, max_size=3), st.integers(1, 6), st.sampled_from([0, 1]))
def test_the_boxes_of_all_ranks_are_the_whole(parts: list[Block], tp: int, dim: int) -> None:
    split = Split(dim, tuple(parts))
    if not split.can(tp):
        assert any(block.num_units < tp for block in parts)
        return
    width = sum(block.size for block in parts)
    shape = (width, 3) if dim == 0 else (3, width)
    held = np.zeros(shape, dtype=int)
    for rank in range(tp):
        boxes = split.boxes(shape, tp, rank)
        assert len(boxes) == len(parts)
        assert sum(box[dim][1] - box[dim][0] for box in boxes) == split.sizes(tp)[rank] > 0
        for box in boxes:
            held[tuple(slice(*side) for side in box)] += 1
    assert (held == 1).all()


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 8))
def test_queries_are_where_their_keys_are(kv_heads: int, group: int, head_dim: int, tp: int) -> None:
    queries, keys = heads(kv_heads * group, kv_heads, head_dim)
    if not (queries.can(tp) and keys.can(tp)):
        assert tp > kv_heads
        assert tp % kv_heads or (kv_heads * group) % tp
        return
    for rank in range(tp):
        first, last = (edge // head_dim for edge in queries.interval(tp, rank))
        start, stop = (edge // head_dim for edge in keys.interval(tp, rank))
        assert {head // group for head in range(first, last)} == set(range(start, stop))
        assert (last - first) % (stop - start) == 0
        holders = keys.holders(tp, rank)
        assert rank in holders
        assert {keys.interval(tp, holder) for holder in holders} == {keys.interval(tp, rank)}
        assert len(holders) == max(1, tp // kv_heads)
        assert queries.holders(tp, rank) == (rank,)


def test_units_that_do_not_divide_go_to_the_first_ranks() -> None:
    assert [Block(7).interval(3, rank) for rank in range(3)] == [(0, 3), (3, 5), (5, 7)]
    assert Split(0, (Block(257),)).sizes(2) == [129, 128]


def test_a_fused_parameter_is_cut_in_each_of_its_parts() -> None:
    queries, keys = heads(4, 2, 8)
    assert Split(1, (queries, keys, keys)).boxes((5, 64), 2, 1) == [((0, 5), (16, 32)), ((0, 5), (40, 48)), ((0, 5), (56, 64))]


@pytest.mark.parametrize(("tp", "can"), [(1, True), (2, True), (3, False), (4, True), (5, False), (8, True), (16, False)])
def test_more_ranks_than_heads(tp: int, can: bool) -> None:
    queries, keys = heads(8, 2, 4)
    assert (queries.can(tp) and keys.can(tp)) is can


def test_a_size_that_its_unit_does_not_divide_cannot_be_cut() -> None:
    assert not Block(10, 4).can(2)


def test_what_cannot_be_shared_names_what_can() -> None:
    queries, keys = heads(8, 2, 4)
    splits = [("q", Split(0, (queries,))), ("k", Split(0, (keys,))), ("up", Split(0, (Block(100),)))]
    assert valid_degrees([split for _, split in splits], 64) == [1, 2, 4, 8]
    assert list(split_problems(None, splits, 4, "tiny")) == []
    (problem,) = split_problems(None, splits, 3, "tiny")
    assert (problem.key, problem.value) == ("parallel.tp", 3)
    assert "q has 2 x 16 along dim 0, which 3 ranks cannot share" in problem.reason
    assert problem.fix == "The model tiny can be split into 1, 2, 4, 8."


def test_a_model_that_cannot_be_split_says_why() -> None:
    (problem,) = split_problems("it is odd.", [], 2, "tiny")
    assert "tiny cannot be split: it is odd." in problem.reason
    assert list(split_problems("it is odd.", [], 1, "tiny")) == []
