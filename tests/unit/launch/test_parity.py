"""What layouts mean, and when two runs agree."""

from __future__ import annotations

import pytest

from anyshard.configs.errors import ConfigError
from anyshard.launch.parity import agree, overrides_of


def test_a_layout_is_overrides() -> None:
    assert overrides_of("dp2xtp2xz3") == [
        "zero=z3",
        "parallel.dp=2",
        "parallel.tp=2",
        "parallel.pp=1",
        "parallel.sp=1",
        "launch.procs_per_node=4",
        "launch.nodes=1",
    ]
    assert "launch.procs_per_node=1" in overrides_of("dp1")


@pytest.mark.parametrize("layout", ["", "two", "dp", "dp0", "dp2xdp2", "dp2,tp2", "ep2"])
def test_what_is_no_layout(layout: str) -> None:
    with pytest.raises(ConfigError, match="such as dp2, tp2 or dp2xtp2xz3"):
        overrides_of(layout)


def record(step: int, loss: float, norm: float | None = 1.0) -> dict[str, object]:
    return {"step": step, "train/loss": loss, "train/grad_norm": norm}


def test_agreement() -> None:
    run = [record(1, 5.0), record(2, 4.0, 2.0)]
    assert agree(run, [record(1, 5.0 + 2e-5), record(2, 4.0, 2.0 + 1e-4)], 1e-5)
    assert not agree(run, [record(1, 5.001), record(2, 4.0, 2.0)], 1e-5)
    assert not agree(run, [record(1, 5.0), record(2, 4.0, 2.1)], 1e-5)
    assert not agree(run, run[:1], 1e-5)
    assert not agree(run, [record(1, 5.0, None), record(2, 4.0, 2.0)], 1e-5)
    assert not agree([], [], 1e-5)
