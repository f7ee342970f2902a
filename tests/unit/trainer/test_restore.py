"""Layouts as stored in checkpoints: ranks go on with their own random numbers only where they stand at the same place."""

from __future__ import annotations

from helpers.configs import make_config

from anyshard.trainer.restore import describe_layout, layout_of


def test_an_order_of_its_own_is_another_layout() -> None:
    usual = layout_of(make_config({"parallel.tp": 2}), 4)
    other = layout_of(make_config({"parallel.tp": 2, "parallel.order": ["dp", "tp", "sp", "pp"]}), 4)
    assert usual == {k: v for k, v in other.items() if k != "order"}
    assert usual != other
    assert describe_layout(usual) == describe_layout(other) == "dp 2, tp 2, ZeRO 1"
