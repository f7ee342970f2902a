from __future__ import annotations

from typing import Any

import pytest

from anyshard.configs.deepspeed_keys import KNOWN_TOP_LEVEL, OWNED, REFUSED, REMOVED, extra_problems
from anyshard.configs.keys import all_keys


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (
            {"zero_optimisation": {"stage": 3}},
            "no such key; DeepSpeed would ignore it without a word. Did you mean deepspeed_extra.zero_optimization?",
        ),
        (
            {"zero_optimization": {"stag": 3}},
            "DeepSpeed would refuse it. Did you mean deepspeed_extra.zero_optimization.stage?",
        ),
        (
            {"gradient_clipping": 2.0},
            "deepspeed_extra.gradient_clipping=2.0: train.max_grad_norm sets this. Set train.max_grad_norm instead.",
        ),
        ({"zero_optimization": {"stage": 3}}, "Set zero.stage instead."),
        ({"optimizer": {"type": "Adam"}}, "Set optimizer.name instead."),
        ({"checkpoint": {"load_universal": "yes"}}, "Set checkpoint.mode instead."),
        ({"tensor_parallel": {"autotp_size": 2}}, "Set parallel.tp instead."),
        ({"bf16": True}, "DeepSpeed wants a mapping here."),
        ({"bf16": {"enabled": True}}, "Set precision.dtype instead."),
        ({"wall_clock_breakdown": "auto"}, "DeepSpeed knows no 'auto'"),
        ({"zero_optimization": {"reduce_scatter": "auto"}}, "DeepSpeed knows no 'auto'"),
        ({"amp": {"enabled": True}}, "DeepSpeed removed amp. Instead: use precision=bf16"),
        ({"zero_optimization": {"mics_shard_size": 2}}, "DeepSpeed removed zero_optimization.mics_shard_size."),
        ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, "scrambles the weights"),
        ({"expert_parallel": {"enabled": True}}, "fails with transformers 5"),
        ({"zero_optimization": {"compute_grad_norm": False}}, "it cannot be used"),
    ],
)
def test_refused(extra: dict[str, Any], said: str) -> None:
    problems = list(extra_problems(extra))
    assert len(problems) == 1, problems
    assert said in str(problems[0])


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"wall_clock_breakdown": True, "steps_per_print": 10},
        {"zero_optimization": {"stage3_module_granularity_threshold": 10, "offload_optimizer": {"buffer_count": 8}}},
        {"comms_logger": {"enabled": True}},
        {"bf16": {"immediate_grad_update": True}},
    ],
)
def test_accepted(extra: dict[str, Any]) -> None:
    assert list(extra_problems(extra)) == []


def test_all_problems_are_told() -> None:
    extra = {"zero_optimisation": {}, "gradient_clipping": 1, "zero_optimization": {"stag": "auto", "stage": 3}}
    assert len(list(extra_problems(extra))) == 5  # the misspelt key is also "auto"


def test_tables_name_keys_that_exist() -> None:
    for ours in OWNED.values():
        assert ours in all_keys(), ours
    for path in (*OWNED, *REFUSED):
        assert path.partition(".")[0] in KNOWN_TOP_LEVEL, path
    assert not set(REMOVED) & set(KNOWN_TOP_LEVEL)
