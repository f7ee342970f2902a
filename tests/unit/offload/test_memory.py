import pytest

from anyshard.offload.memory import (
    GIB,
    Layout,
    ModelShape,
    activation_bytes,
    logits_bytes,
    model_state_bytes,
    plan_memory,
    staging_bytes,
)

# Table 1 of the ZeRO paper, GB of model states per rank: (params in billions, dp) -> stages 1, 2, 3
ZERO_TABLE = {
    (7.5, 1): (120, 120, 120),
    (7.5, 4): (52.5, 41.3, 30),
    (7.5, 16): (35.6, 21.6, 7.5),
    (7.5, 64): (31.4, 16.6, 1.88),
    (7.5, 256): (30.4, 15.4, 0.47),
    (7.5, 1024): (30.1, 15.1, 0.12),
    (128, 1): (2048, 2048, 2048),
    (128, 4): (896, 704, 512),
    (128, 16): (608, 368, 128),
    (128, 64): (536, 284, 32),
    (128, 256): (518, 263, 8),
    (128, 1024): (513, 257, 2),
    (1000, 1): (16000, 16000, 16000),
    (1000, 4): (7000, 5500, 4000),
    (1000, 16): (4750, 2875, 1000),
    (1000, 64): (4187, 2218, 250),
    (1000, 256): (4046, 2054, 62.5),
    (1000, 1024): (4011, 2013, 15.6),
}


@pytest.mark.parametrize(("params", "dp"), ZERO_TABLE)
def test_model_states_are_those_of_the_zero_paper(params, dp):
    for stage, expected in zip((1, 2, 3), ZERO_TABLE[params, dp], strict=True):
        total = sum(model_state_bytes(round(params * 1e9), Layout(dp=dp, stage=stage, dtype="bf16", state_bytes=8)))
        # the paper prints three to four digits, partly rounded down
        assert total / 1e9 == pytest.approx(expected, rel=0.0065, abs=0.005)


def test_fp32_at_stage_0_has_no_second_master():
    weights, gradients, optimizer = model_state_bytes(1000, Layout(dp=4, stage=0, dtype="fp32", state_bytes=8))
    assert (weights, gradients, optimizer) == (4000, 4000, 8000)
    assert model_state_bytes(1000, Layout(dp=1, stage=1, dtype="fp32", state_bytes=8))[2] == 12000


SHAPE = ModelShape(num_params=10**6, num_layers=4, hidden_size=64, intermediate_size=128, vocab_size=1000)


def test_tensor_parallelism_divides_what_is_inside_the_blocks():
    def activations(tp):
        return activation_bytes(SHAPE, micro_batch_size=1, sequence_length=8, dtype="bf16", recompute=False, tp=tp)

    inputs = 4 * 8 * 2 * 4 * 64  # layers * tokens * bytes * 4 hidden: whole on every rank
    assert activations(2) - inputs == (activations(1) - inputs) / 2


def test_tiles_bound_logits_and_the_inside_of_feed_forward_blocks():
    def activations(length, tile):
        sizes = {"micro_batch_size": 2, "sequence_length": length, "dtype": "bf16"}
        return activation_bytes(SHAPE, **sizes, recompute=False, mlp_tile_tokens=tile)

    def logits(length, tile):
        return logits_bytes(SHAPE, micro_batch_size=2, sequence_length=length, dtype="bf16", loss_tile_tokens=tile)

    assert logits(8, 4) == logits(800, 4) == logits(2, None)
    assert logits(8, 1000) == logits(8, None)
    inside = 2 * 3 * SHAPE.intermediate_size
    assert activations(8, None) - activations(8, 4) == inside * (16 * SHAPE.num_layers - 4)
    assert activations(8, 1000) == activations(8, 16)


def test_offloaded_state_moves_to_the_host_and_nothing_is_lost():
    def memory(**tiers):
        return plan_memory(
            SHAPE,
            Layout(dp=2, stage=3, dtype="bf16", state_bytes=8, **tiers),
            micro_batch_size=1,
            sequence_length=8,
            recompute=False,
        )

    near, optimizer, both = memory(), memory(optimizer_on_host=True), memory(optimizer_on_host=True, params_on_host=True)
    assert near.host_bytes == 0
    assert optimizer.host_bytes == near.optimizer + near.gradients
    assert both.host_bytes == near.optimizer + near.gradients + near.weights
    assert near.device_bytes == optimizer.device_bytes + optimizer.host_bytes == both.device_bytes + both.host_bytes
    assert both.to_dict()["host_bytes"] == both.host_bytes


def test_recomputation_keeps_one_layer_and_the_inputs_of_the_others():
    sizes = {
        recompute: activation_bytes(SHAPE, micro_batch_size=2, sequence_length=16, dtype="bf16", recompute=recompute)
        for recompute in (False, True)
    }
    layer = 2 * 16 * 2 * (8 * 64 + 3 * 128)
    assert sizes == {False: 4 * layer, True: layer + 4 * 2 * 16 * 2 * 64}


@pytest.mark.parametrize("saved_bytes", [0, 1, 2**20, GIB, 7 * GIB + 5])
@pytest.mark.parametrize("bound_bytes", [None, 1, 100 * 2**20, 3 * GIB])
def test_staging_is_planned_as_it_is_taken(saved_bytes, bound_bytes):
    from anyshard.trainer.checkpoint import staging

    planned = staging_bytes(saved_bytes, bound_bytes=bound_bytes, free_bytes=20 * GIB, background=True)
    blocks = staging.blocks_for(saved_bytes) + 1  # one for buffers
    taken = staging.max_blocks(blocks * staging.BLOCK_BYTES, bound_bytes, free_bytes=20 * GIB)
    assert planned == taken * staging.BLOCK_BYTES
    waiting = staging_bytes(saved_bytes, bound_bytes=bound_bytes, free_bytes=20 * GIB, background=False)
    assert waiting == staging.MIN_BLOCKS * staging.BLOCK_BYTES
