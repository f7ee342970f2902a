"""FLOPs by hand-computed values."""

from __future__ import annotations

import pytest

from anyshard.trainer.flops import FP32_TFLOPS, PEAK_TFLOPS, flops_per_token, peak_tflops
from anyshard.trainer.models.param_table import Param, ParamTable


def _table(**changes: object) -> ParamTable:
    values: dict[str, object] = {
        "params": (Param("embed", (100, 8)), Param("proj", (10, 8)), Param("head", (100, 8))),
        "tied": (),
        "embedding_names": ("embed",),
        "expert_names": (),
        "model_type": "x",
        "hidden_size": 8,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 2,
        "intermediate_size": 16,
        "vocab_size": 100,
        "max_positions": None,
        "num_experts": 0,
        "experts_per_token": 0,
    }
    return ParamTable(**{**values, **changes})  # type: ignore[arg-type]


def test_counts_projections_head_and_attention() -> None:
    # 80 + 800 weights: 6 * 880 = 5280; attention 12 * 2 * 4 * 2 * 16 = 3072
    assert flops_per_token(_table(), 16) == 5280 + 3072


def test_a_tied_head_counts_once_as_a_product() -> None:
    params = (Param("embed", (100, 8)), Param("proj", (10, 8)))
    assert flops_per_token(_table(params=params, tied=(("head", "embed"),)), 16) == 5280 + 3072


def test_recomputing_adds_one_forward() -> None:
    assert flops_per_token(_table(), 16, recompute=True) == pytest.approx((5280 + 3072) * 4 / 3)


def test_only_the_experts_of_a_token_count() -> None:
    params = (*_table().params, Param("experts", (4, 10, 8)))
    table = _table(params=params, expert_names=("experts",), num_experts=4, experts_per_token=1)
    assert flops_per_token(table, 16) == 5280 + 6 * 80 + 3072


def test_llama3_8b_matches_the_known_value() -> None:
    # 6 * (8030261248 - 525336576) + 12 * 32 * 32 * 128 * 8192 = 45.03e9 + 12.88e9
    params = (Param("embed", (128256, 4096)), Param("rest", (8030261248 - 128256 * 4096,)))
    table = _table(params=params, num_layers=32, num_heads=32, head_dim=128)
    assert flops_per_token(table, 8192) == 6 * 7504924672 + 12 * 32 * 32 * 128 * 8192


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.0),
        ("NVIDIA H100 PCIe", "bf16", 756.0),
        ("NVIDIA H200", "bf16", 989.0),
        ("NVIDIA B200", "bf16", 2250.0),
        ("NVIDIA A100-SXM4-80GB", "fp16", 312.0),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5),
        ("Tesla V100-SXM2-16GB", "fp16", 125.0),
        ("Tesla V100-SXM2-16GB", "bf16", None),
        ("NVIDIA L40S", "bf16", 362.0),
        ("NVIDIA L4", "bf16", 121.0),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA A10G", "bf16", 70.0),
        ("cpu", "bf16", None),
        ("cpu", "fp32", None),
    ],
)
def test_peak_by_device_name(name: str, dtype: str, peak: float | None) -> None:
    assert peak_tflops(name, dtype) == peak


def test_no_entry_hides_behind_a_shorter_one() -> None:
    for table in ([part for part, *_ in PEAK_TFLOPS], [part for part, _ in FP32_TFLOPS]):
        for position, part in enumerate(table):
            assert next(other for other in table if other in part) == part, (position, part)
