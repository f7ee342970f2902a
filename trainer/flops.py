"""Work of a model and peak of a device, for model FLOPs utilisation (MFU). Pure."""

from __future__ import annotations

from anyshard.trainer.models.param_table import ParamTable

PEAK_TFLOPS: tuple[tuple[str, float, float | None], ...] = (
    ("GB200", 2500.0, 2500.0),
    ("GB300", 2500.0, 2500.0),
    ("B300", 2250.0, 2250.0),
    ("B200", 2250.0, 2250.0),
    ("GH200", 989.0, 989.0),
    ("H200 NVL", 835.0, 835.0),
    ("H200", 989.0, 989.0),
    ("H100 NVL", 835.0, 835.0),
    ("H100 PCIE", 756.0, 756.0),
    ("H100", 989.0, 989.0),
    ("H800", 989.0, 989.0),
    ("H20", 148.0, 148.0),
    ("A100", 312.0, 312.0),
    ("A800", 312.0, 312.0),
    ("A40", 149.7, 149.7),
    ("A30", 165.0, 165.0),
    ("A10G", 70.0, 70.0),
    ("A10", 125.0, 125.0),
    ("L40S", 362.0, 362.0),
    ("L40", 181.0, 181.0),
    ("L4", 121.0, 121.0),
    ("RTX 5090", 209.5, 209.5),
    ("RTX 4090", 165.2, 165.2),
    ("RTX 3090", 71.2, 71.2),
    ("V100", 125.0, None),
    ("T4", 65.0, None),
)
"""Part of a device's name, its dense peak in fp16 and in bf16 with fp32 accumulation, in TFLOP/s; the first match counts.

Source: NVIDIA's data sheets, without sparsity (H100 SXM 1979 with, 989 without); V100 and T4 have no bf16.
"""

FP32_TFLOPS: tuple[tuple[str, float], ...] = (("H200", 67.0), ("H100", 67.0), ("A100", 19.5), ("V100", 15.7), ("T4", 8.1))
"""The same for fp32 outside the tensor cores (torch's default for matrix products is not TF32)."""


def flops_per_token(table: ParamTable, sequence_length: int, *, recompute: bool = False) -> float:
    """Floating-point operations of one forward and backward for one token: 6 N + 12 L H Q T.

    N counts the parameters that multiply: not the embeddings, but the output head, also where it is tied to one. Of routed
    experts only those that a token is sent to count. L, H, Q are layers, heads and head dimension, T the sequence length.

    Args:
        recompute: count the second forward of activation checkpointing (hardware FLOPs rather than the model's).

    Source: PaLM, Chowdhery et al., arXiv 2204.02311, appendix B. Causal attention is not counted at half, as there.
    """
    head = table.vocab_size * table.hidden_size if table.tied else 0
    idle = table.num_expert_params * (1 - table.experts_per_token / table.num_experts) if table.num_experts else 0.0
    weights = table.num_params - table.num_embedding_params + head - idle
    attention = table.num_layers * table.num_heads * table.head_dim * sequence_length
    return (6 * weights + 12 * attention) * (4 / 3 if recompute else 1)


def peak_tflops(device_name: str, dtype: str) -> float | None:
    """Dense peak of a device in TFLOP/s; None where this device or type is not in the table.

    Args:
        device_name: as the driver gives it ("NVIDIA H100 80GB HBM3").
        dtype: "bf16", "fp16" or "fp32".
    """
    name = device_name.upper()
    if dtype == "fp32":
        return next((peak for part, peak in FP32_TFLOPS if part in name), None)
    for part, fp16, bf16 in PEAK_TFLOPS:
        if part in name:
            return bf16 if dtype == "bf16" else fp16
    return None
