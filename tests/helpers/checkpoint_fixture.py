"""Writes the small checkpoint of the present format version that later versions must still read: run it as a script.

    python tests/helpers/checkpoint_fixture.py tests/assets/checkpoint_v1

Two ranks, ZeRO 1, three steps of AdamW on a linear layer with a frozen parameter and a buffer. Beside the checkpoint goes
`expected.json`: every tensor's values, gathered without any code of the checkpoint package.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn


class Net(nn.Module):
    """Small, with one of everything that a checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.full((3,), 2.0), requires_grad=False)
        self.register_buffer("count", torch.tensor([7, 8, 9]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A loss."""
        return (self.linear(x) * self.scale).square().mean()


def write(directory: str) -> dict[str, Any]:
    """Train three steps and save; returns the expected values on rank 0."""
    import deepspeed
    import torch.distributed as dist
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    from anyshard.trainer.checkpoint.manager import CheckpointManager
    from anyshard.trainer.checkpoint.retention import Retention

    model = Net()
    groups = [
        {"name": "decay", "params": [model.linear.weight], "weight_decay": 0.1},
        {"name": "no_decay", "params": [model.linear.bias], "weight_decay": 0.0},
    ]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},
    }
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    engine = deepspeed.initialize(model=model.bfloat16(), optimizer=optimizer, config=config, dist_init_required=False)[0]
    for step in range(3):
        engine.backward(engine(torch.full((1, 5), float(step + dist.get_rank()), dtype=torch.bfloat16)))
        engine.step()
    engine.optimizer._hp_optimizer_states_linked = False  # upstream links the second group's states one step late
    engine.optimizer._lazy_init_hp_params_optimizer_state()
    expected: dict[str, Any] = {}
    for name, param in (("linear.weight", model.linear.weight), ("linear.bias", model.linear.bias)):
        expected[name] = {"param": safe_get_full_fp32_param(param).tolist()}
        for key in ("exp_avg", "exp_avg_sq"):
            expected[name][key] = safe_get_full_optimizer_state(param, key).tolist()
    expected["scale"] = {"param": model.scale.tolist()}
    expected["count"] = {"buffer": model.count.tolist()}
    manager = CheckpointManager(
        Path(directory),
        stay=Retention(0),
        verify=True,
        group=dist.new_group(backend="gloo"),
        event=lambda kind, **details: None,
    )
    manager.save(engine, step=3, meta={"tokens": 15}, rank_meta={"rank": dist.get_rank()})
    return expected


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from helpers.checkpoint_fixture import write as write_on_rank
    from helpers.ranks import run_ranks

    target = Path(sys.argv[1]).resolve()
    values = run_ranks(write_on_rank, 2, directory=str(target))[0]
    (target / "latest").unlink()
    (target / "expected.json").write_text(json.dumps(values, indent=1) + "\n")
