"""Every registered optimizer in DeepSpeed's engine: at each ZeRO stage, on the device or offloaded, one trajectory."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.models import small_config
from helpers.ranks import run_ranks

from anyshard.configs.registry import names

pytestmark = pytest.mark.dist


def _losses(name: str, cells: list[tuple[int, bool]], steps: int = 6) -> list[list[float]]:
    return [_run(name, stage, offloaded, steps) for stage, offloaded in cells]


def _run(name: str, stage: int, offloaded: bool, steps: int) -> list[float]:
    import deepspeed
    import torch
    import torch.distributed as dist

    from anyshard.configs import schema
    from anyshard.configs.registry import lookup
    from anyshard.trainer.models.hf import build
    from anyshard.trainer.optim.groups import param_groups

    cpu = torch.device("cpu")
    model = build(small_config("llama"), device=cpu, dtype=torch.float32)
    keys = schema.Optimizer(name=name, lr={"sgd": 0.1, "adagrad": 0.01}.get(name, 1e-3), weight_decay=0.1)
    groups = param_groups(model.named_parameters(), keys, {"model.embed_tokens.weight"})
    optimizer = lookup("optimizer", name, key="optimizer.name")(groups, keys, offloaded=offloaded, device=cpu)
    zero: dict[str, Any] = {"stage": stage, "stage3_param_persistence_threshold": 0}
    if offloaded:
        zero["offload_optimizer"] = {"device": "cpu"}
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    ids = torch.randint(0, 272, (2, 32), generator=torch.Generator().manual_seed(dist.get_rank()))
    losses = []
    for _ in range(steps):
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        value = loss.detach().double()
        dist.all_reduce(value)
        losses.append(value.item() / dist.get_world_size())
    assert [group["weight_decay"] for group in engine.optimizer.param_groups] == [0.1, 0.0]
    engine.destroy()
    return losses


@pytest.mark.parametrize("name", names("optimizer"))
def test_one_trajectory_at_every_stage_and_place_of_its_state(name: str) -> None:
    cells = [(0, False), *((stage, offloaded) for stage in (1, 2, 3) for offloaded in (False, True))]
    reference, *others = run_ranks(_losses, 2, timeout_s=240, name=name, cells=cells)[0]
    assert reference[-1] < reference[0]
    for cell, losses in zip(cells[1:], others, strict=True):
        assert losses == pytest.approx(reference, rel=1e-5), cell
