"""What each optimizer keeps beside a parameter; read by the memory planner, so nothing here imports torch."""

from __future__ import annotations

FP32_BYTES = 4

STATES: dict[str, tuple[str, ...]] = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "lion": ("exp_avg",),
    "sgd": ("momentum_buffer",),
    "adagrad": ("sum",),
}
"""Names of the fp32 state tensors that have one element for each element of a parameter."""


UNKNOWN_STATES = 2
"""Of a plugin's optimizer: as AdamW."""


def num_states(name: str, *, momentum: float = 0.9) -> int:
    """State tensors beside the fp32 master; a plugin's optimizer counts as AdamW."""
    size = state_bytes_per_param(name, momentum=momentum)
    return UNKNOWN_STATES if size is None else size // FP32_BYTES


def state_bytes_per_param(name: str, *, momentum: float = 0.9) -> int | None:
    """Bytes of optimizer state for one element of a parameter, without the fp32 master; None for a plugin's optimizer.

    Args:
        name: registered name of the optimizer.
        momentum: `optimizer.momentum`; sgd keeps no state where it is 0.
    """
    if name == "sgd" and momentum == 0:
        return 0
    return FP32_BYTES * len(STATES[name]) if name in STATES else None
