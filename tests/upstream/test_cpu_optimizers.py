"""Why `trainer/optim` does not take DeepSpeed's CPU optimizers as they are (0.19.8); one that fails: upstream is mended."""

from __future__ import annotations

import torch
from torch import nn

from anyshard.offload.ops import cpu_optimizer


def test_cpu_lion_moves_a_weight_whose_gradient_is_zero() -> None:
    """ops/csrc/includes/cpu_lion.h: -copysign(lr, 0) is -lr, where Lion's sign(0) is 0."""
    param = nn.Parameter(torch.ones(8))
    optimizer = cpu_optimizer("lion")([param], lr=0.5, betas=(0.9, 0.99), weight_decay=0.0)
    param.grad = torch.zeros(8)
    optimizer.step()
    assert torch.equal(param.detach(), torch.full((8,), 0.5))


def test_cpu_lion_keeps_a_second_state_that_it_never_reads() -> None:
    """ops/lion/cpu_lion.py: `exp_avg_sq` is made and not passed to the kernel."""
    param = nn.Parameter(torch.ones(8))
    optimizer = cpu_optimizer("lion")([param], lr=0.5)
    param.grad = torch.ones(8)
    optimizer.step()
    assert torch.equal(optimizer.state[param]["exp_avg_sq"], torch.zeros(8))


def test_cpu_adam_takes_another_path_for_steps_that_do_not_follow() -> None:
    """ops/csrc/includes/cpu_adam.h, `IncrementStep`: a running product and a power differ in the last bits."""

    def moved(steps: range) -> torch.Tensor:
        param = nn.Parameter(torch.zeros(1))
        optimizer = cpu_optimizer("adamw")([param], lr=1.0, betas=(0.9, 0.95), adamw_mode=True)
        state = [torch.zeros(1), torch.zeros(1)]
        for step in steps:
            param.data.zero_()
            optimizer.ds_opt_adam.adam_update(
                optimizer.opt_id,
                step,
                1.0,
                0.9,
                0.95,
                1e-8,
                0.0,
                True,
                param.data,
                torch.full((1,), 0.3),
                *[s.zero_() for s in state],
            )
        return param.detach().clone()

    assert any(not torch.equal(moved(range(1, last + 1)), moved(range(last, last + 1))) for last in range(2, 60))
