import pytest
from helpers.configs import make_config

from anyshard.configs.relayout import relayout
from anyshard.configs.world import resolve_ranks


def here(nodes, **keys):
    """A run of 4 nodes x 1 rank that finds itself on fewer or more nodes."""
    heads = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 4}
    asked = {
        "model.config": {"model_type": "llama", "vocab_size": 272, "max_position_embeddings": 2048, **heads},
        "launch.nodes": 4,
        "launch.min_nodes": 1,
        "launch.procs_per_node": 1,
        "train.global_batch_size": 24,
        "train.micro_batch_size": 2,
    }
    changed = {name.replace("__", "."): value for name, value in keys.items()}
    config = make_config({**asked, **changed})
    return relayout(resolve_ranks(config, nodes=nodes, procs_per_node=1))


def layout(config):
    parallel = config.parallel
    return parallel.dp, parallel.tp, parallel.pp, parallel.sp


def test_a_layout_that_fits_stays():
    config, notes = here(2, parallel__tp=2)
    assert (layout(config), notes) == ((1, 2, 1, 1), [])


@pytest.mark.parametrize(
    ("nodes", "tp", "chosen"),
    [
        (3, 2, (3, 1, 1, 1)),
        (1, 2, (1, 1, 1, 1)),
        (2, 4, (1, 2, 1, 1)),  # as near to 4 as it can be
        (6, 4, (3, 2, 1, 1)),
    ],
)
def test_tp_that_does_not_fit_becomes_the_nearest_that_does(nodes, tp, chosen):
    config, (note,) = here(nodes, parallel__tp=tp)
    assert layout(config) == chosen
    assert note.startswith(f"another layout for the {nodes} ranks that are here: tp {tp} -> {chosen[1]}")


def test_a_smaller_micro_batch_comes_before_another_layout():
    config, (note,) = here(2, train__global_batch_size=6, train__micro_batch_size=2)
    assert (layout(config), config.train.micro_batch_size) == ((2, 1, 1, 1), 1)
    assert "train.micro_batch_size 2 -> 1, dp 2" in note


def test_what_no_layout_mends_is_left_to_the_rules():
    config, notes = here(3, train__global_batch_size=4, train__micro_batch_size=1)
    assert (layout(config), notes) == ((3, 1, 1, 1), [])
    config, notes = here(3, parallel__tp=2, optimizer__lr=-1.0)
    assert notes == []


def test_a_run_of_one_size_keeps_its_layout():
    assert here(3, parallel__tp=2, launch__min_nodes=None)[1] == []
