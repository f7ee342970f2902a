"""The rank pools themselves: values, failures, hangs, deaths, and engines of different stages one after another."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import pytest
from helpers.ranks import RanksError, run_ranks

pytestmark = pytest.mark.dist


@dataclass
class Point:
    x: int


def _all_reduce(point: Point) -> tuple[Point, int]:
    import torch
    import torch.distributed as dist

    tensor = torch.tensor([point.x + dist.get_rank()])
    dist.all_reduce(tensor)
    return Point(int(tensor.item())), os.getpid()


def _fail_on_rank_1() -> None:
    import torch.distributed as dist

    if dist.get_rank() == 1:
        raise ValueError("out of luck")
    dist.barrier()


def _hang() -> None:
    import torch.distributed as dist

    print("going to sleep", flush=True)
    if dist.get_rank() == 0:
        time.sleep(600)
    dist.barrier()


def _die() -> None:
    import torch.distributed as dist

    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


def _losses(stage: int, steps: int = 3) -> list[float]:
    """A few steps of a DeepSpeed engine at a ZeRO stage, in fp32."""
    import deepspeed
    import torch
    import torch.distributed as dist

    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": stage},
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    losses = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        batch = torch.randn(4, 8, generator=generator).chunk(2)[dist.get_rank()]
        loss = engine(batch).square().mean()
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / 2)
    engine.destroy()
    return losses


def test_values_come_back_by_rank_and_processes_stay() -> None:
    first = run_ranks(_all_reduce, 2, point=Point(1))
    second = run_ranks(_all_reduce, 2, point=Point(2))
    assert [value for value, _ in first] == [Point(3), Point(3)]
    assert [value for value, _ in second] == [Point(5), Point(5)]
    assert [pid for _, pid in first] == [pid for _, pid in second]


def test_fresh_uses_new_processes() -> None:
    kept = {pid for _, pid in run_ranks(_all_reduce, 2, point=Point(1))}
    new = {pid for _, pid in run_ranks(_all_reduce, 2, fresh=True, point=Point(1))}
    again = {pid for _, pid in run_ranks(_all_reduce, 2, point=Point(1))}
    assert kept == again
    assert not kept & new


def test_a_failing_rank_is_reported_with_what_the_others_did() -> None:
    with pytest.raises(RanksError) as caught:
        run_ranks(_fail_on_rank_1, 2)
    text = str(caught.value)
    assert "ValueError: out of luck" in text
    assert "rank 0: still running" in text
    assert "in _fail_on_rank_1" in text
    assert [value for value, _ in run_ranks(_all_reduce, 2, point=Point(1))] == [Point(3), Point(3)]


def test_a_hang_is_reported_with_stacks_and_output() -> None:
    with pytest.raises(RanksError) as caught:
        run_ranks(_hang, 2, timeout_s=2)
    text = str(caught.value)
    assert "did not end within 2 s" in text
    assert text.count("in _hang") == 2
    assert "going to sleep" in text


def test_a_dead_rank_is_reported() -> None:
    with pytest.raises(RanksError, match="rank 1: the process died with exit code 7"):
        run_ranks(_die, 2)


def test_a_local_function_is_refused() -> None:
    with pytest.raises(TypeError, match="not at module level"):
        run_ranks(lambda: None, 2)


def test_engines_of_all_stages_follow_each_other_in_one_process() -> None:
    losses = {stage: run_ranks(_losses, 2, stage=stage)[0] for stage in (0, 3, 1, 2, 3, 0)}
    for stage in (1, 2, 3):
        assert losses[stage] == pytest.approx(losses[0], rel=1e-5), stage
