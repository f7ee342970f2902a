"""Internals of DeepSpeed that reading and writing its live state depends on (trainer/checkpoint/layout.py lists them)."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.checkpoint_engines import Layout, engine_of, train
from helpers.ranks import run_ranks
from helpers.upstream import line, still

LAYOUT = "trainer/checkpoint/layout.py"
OPTIMIZERS = "trainer/checkpoint/optimizers.py"


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("runtime/zero/stage_1_and_2.py:354", "self.bit16_groups = []"),
        ("runtime/zero/stage_1_and_2.py:364", "self.single_partition_of_fp32_groups = []"),
        ("runtime/zero/stage_1_and_2.py:744", "self._hp_optimizer_states_linked = False"),
        ("runtime/zero/stage_1_and_2.py:3172", "def update_lp_params(self):"),
        ("runtime/bf16_optimizer.py:105", "self.bf16_groups = []"),
        ("runtime/bf16_optimizer.py:109", "self.fp32_groups_flat_partition = []"),
        ("runtime/bf16_optimizer.py:235", "self._hp_optimizer_states_linked = False"),
        ("runtime/bf16_optimizer.py:593", "def update_lp_params(self):"),
        ("utils/tensor_fragment.py:21", "lp_fragment_address: fragment_address"),
        ("utils/tensor_fragment.py:23", "hp_fragment_address: fragment_address"),
        ("runtime/zero/stage3.py:401", "self.fp16_groups = []"),
        ("runtime/zero/stage3.py:416", "self.fp32_partitioned_groups_flat = []"),
        ("runtime/zero/stage3.py:1565", "def get_param_id(self, param):"),
        ("runtime/zero/stage3.py:1955", "self.grad_position[param_id] = [int(i), int(current_offset), int(num_elements)]"),
        ("runtime/zero/stage3.py:2854", "def _reassign_or_swap_out_partitioned_parameters(self, sub_group_id):"),
        ("runtime/zero/stage3.py:3844", "def checkpoint_event_prologue(self):"),
        ("runtime/zero/stage3.py:3847", "def checkpoint_event_epilogue(self):"),
        ("runtime/zero/partition_parameters.py:1302", "param.ds_process_group = "),
        ("runtime/zero/partition_parameters.py:1638", "def partition_numel():"),
        ("runtime/engine.py:536", "self.global_steps = 0"),
        ("runtime/engine.py:537", "self.global_samples = 0"),
        ("runtime/engine.py:538", "self.micro_steps = 0"),
        ("runtime/engine.py:541", "self.skipped_steps = 0"),
        ("runtime/fp16/loss_scaler.py:228", "self.cur_iter = 0"),
        ("runtime/fp16/loss_scaler.py:229", "self.last_overflow_iter = -1"),
        ("runtime/fp16/loss_scaler.py:234", "self.cur_hysteresis = delayed_shift"),
    ],
)
def test_where_the_state_is(where: str, text: str) -> None:
    assert text in line(where), f"{where} is now {line(where).strip()!r}: look again at {LAYOUT} and correct its list"


def _shape_of_the_state(layout: Layout) -> dict[str, Any]:
    """On a rank: that flat tensors, addresses and states are what `layout.slots` takes them for."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    with engine_of(layout) as engine:
        before = dict(engine.optimizer.state)
        train(engine, 0, 1)
        optimizer = engine.optimizer
        if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
            flats = optimizer.fp32_partitioned_groups_flat
            params = [param for group in optimizer.fp16_groups for param in group]
            addressed = all(optimizer.grad_position[optimizer.get_param_id(p)][2] == p.partition_numel() for p in params)
        else:
            flats = getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_groups_flat_partition
            groups = getattr(optimizer, "bit16_groups", None) or optimizer.bf16_groups
            mappings = [param._hp_mapping for group in groups for param in group if param._hp_mapping]
            addressed = all(
                m.hp_fragment_address.numel == m.lp_fragment_address.numel == m.hp_fragment.numel() for m in mappings
            )
        states = [optimizer.optimizer.state[flat] for flat in flats]
        return {
            "no state before the first step": not before,
            "state is keyed by the flat tensor": all(
                state["exp_avg"].shape == flat.shape for state, flat in zip(states, flats, strict=True)
            ),
            "addresses": addressed,
            "fp32": all(flat.dim() == 1 and flat.dtype.itemsize == 4 for flat in flats),
            "group keys": [(group["name"], len(group["param_names"]) > 0) for group in optimizer.param_groups],
        }


@pytest.mark.dist
@pytest.mark.parametrize(
    "layout",
    [Layout(2, 1), Layout(2, 2, offload=True, dtype="bf16"), Layout(2, 1, dtype="bf16", fp32_accumulation=True), Layout(2, 3)],
    ids=str,
)
def test_state_is_keyed_by_flat_partitions(layout: Layout) -> None:
    for found in run_ranks(_shape_of_the_state, 2, layout=layout):
        assert found.pop("group keys") == [("decay", True), ("no_decay", True)]
        assert all(found.values()), found


def test_loading_under_zero3_gives_every_group_the_settings_of_the_first() -> None:
    still(
        holds='["param_groups"][0].items()' in line("runtime/zero/stage3.py:3687"),
        where="runtime/zero/stage3.py:3686",
        text="we can obtain from any parameter",
        workaround=f"{OPTIMIZERS}: set_hyper_parameters could be left to DeepSpeed if its loader were used at all",
    )


def test_cpu_lion_allocates_a_state_that_it_never_reads() -> None:
    still(
        holds="exp_avg_sq" not in line("ops/lion/cpu_lion.py:131"),
        where="ops/lion/cpu_lion.py:124",
        text="state['exp_avg_sq'] = torch.zeros_like",
        workaround=f"{OPTIMIZERS}: Habits.unused of DeepSpeedCPULion",
    )


def test_cpu_lion_takes_the_sign_of_zero_for_one() -> None:
    """A weight without a gradient moves by the learning rate at every step; torch's Lion leaves it alone."""
    import torch
    from deepspeed.ops.lion import DeepSpeedCPULion

    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.zeros(3)
    DeepSpeedCPULion([param], lr=0.1, weight_decay=0.0).step()
    still(
        holds=bool((param < 1).all()),
        where="ops/csrc/lion/cpu_lion_impl.cpp:52",
        text="-std::copysignf(alpha, tmp)",
        workaround="tests/dist/test_checkpoint.py, which compares no losses between the two implementations of Lion",
    )


@pytest.mark.parametrize("betas", [[(0.9, 0.95), (0.9, 0.95)], [(0.9, 0.95), (0.8, 0.99)]], ids=["same betas", "own betas"])
def test_cpu_adam_goes_on_bit_for_bit_only_with_its_powers_of_beta(betas: list[tuple[float, float]]) -> None:
    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    from anyshard.trainer.checkpoint.optimizers import replay_bias_correction

    def build() -> DeepSpeedCPUAdam:
        torch.manual_seed(0)
        groups = [{"params": [torch.nn.Parameter(torch.randn(257))], "betas": each} for each in betas]
        return DeepSpeedCPUAdam(groups, lr=1e-2)

    def run(optimizer: DeepSpeedCPUAdam, first: int, last: int) -> torch.Tensor:
        for step in range(first, last):
            for group in optimizer.param_groups:
                group["params"][0].grad = torch.randn(257, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        return torch.cat([group["params"][0].detach() for group in optimizer.param_groups])

    def resume(*, replay: bool) -> torch.Tensor:
        first, second = build(), build()
        run(first, 0, 40)
        for old, new in zip(first.param_groups, second.param_groups, strict=True):
            new["params"][0].data.copy_(old["params"][0].data)
            second.state[new["params"][0]] = dict(first.state[old["params"][0]].items())
        if replay:
            replay_bias_correction(second)
        return run(second, 40, 60)

    uninterrupted = run(build(), 0, 60)
    assert torch.equal(resume(replay=True), uninterrupted)
    if betas[0] == betas[1]:
        still(
            holds=not torch.equal(resume(replay=False), uninterrupted),
            where="ops/csrc/includes/cpu_adam.h:82",
            text="_betta1_t *= _betta1",
            workaround=f"{OPTIMIZERS}: replay_bias_correction",
        )
