"""Every tier: DeepSpeed takes its fragment, its bytes add up, it says what it lacks, and what cannot fit."""

from __future__ import annotations

import pytest
from helpers.configs import make_config

from anyshard.configs.errors import ConfigError
from anyshard.configs.schema import Device
from anyshard.offload import op_cache, tiers
from anyshard.offload.derive import Aio

PARTS = tiers.Parts(
    names={"embed.weight": 8_000_000, "block.up.weight": 4_000_000, "block.norm.weight": 100},
    groups=[[4_000_000], [8_000_000, 100]],
    dp=2,
    num_states=2,
    element_bytes=2,
)
STATE_BYTES, WEIGHT_BYTES = 12 * 12_000_100, 2 * 12_000_100


def _config(optimizer: str, param: str, **more):
    changes = {"offload.optimizer": optimizer, "offload.param": param, "offload.nvme_path": "/mnt", "zero.stage": 3}
    return make_config(changes | more)


def test_there_is_a_tier_for_every_value():
    assert list(tiers.tiers()) == [device.value for device in Device if device is not Device.none]


@pytest.mark.parametrize("param", ["none", *tiers.tiers()])
@pytest.mark.parametrize("optimizer", tiers.tiers())
def test_deepspeed_takes_the_fragment_and_nothing_is_lost(optimizer, param):
    from helpers.upstream import ds_config

    config = _config(optimizer, param)
    fragment = tiers.fragment(config, PARTS, folder="/mnt/x", aio=Aio())
    parsed = ds_config(zero_optimization={"stage": 3, **fragment.zero}, **fragment.top)
    assert parsed.zero_config.offload_optimizer.device == optimizer
    if param != "none":
        assert parsed.zero_config.offload_param.device == param
    held = fragment.bytes.host - (fragment.bytes.pinned if "nvme" in (optimizer, param) and param != "cpu" else 0)
    wanted = STATE_BYTES + (WEIGHT_BYTES if param != "none" else 0)
    if param == "cpu" and optimizer == "nvme":  # page-locked buffers, and page-locked weights
        held = fragment.bytes.host - (fragment.bytes.pinned - WEIGHT_BYTES)
    assert held + fragment.bytes.nvme == pytest.approx(wanted, abs=8192)
    assert ("aio" in fragment.top) == ("nvme" in (optimizer, param))


@pytest.mark.parametrize("name", tiers.tiers())
def test_what_is_missing_on_this_machine_is_told_with_the_command(monkeypatch, tmp_path, name):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    (problem,) = tiers.lacks(_config(name, "none"))
    assert "apt-get install" in problem.fix
    monkeypatch.setattr("anyshard.offload.op_cache._is_built", lambda *_: True)
    assert not list(tiers.lacks(_config(name, "none")))
    assert {entry.state for entry in op_cache.status()} == {"built"}


@pytest.mark.parametrize(
    ("optimizer", "param", "says"), [("nvme", "none", "8,000,000 elements"), ("cpu", "nvme", "MiB to write")]
)
def test_buffers_that_cannot_hold_the_largest_part_are_refused_with_the_number_that_can(optimizer, param, says):
    config = _config(optimizer, param, **{"offload.buffers_gib": 0.02})
    with pytest.raises(ConfigError, match=says) as caught:
        tiers.fragment(config, PARTS, folder="/mnt/x", aio=Aio())
    (problem,) = caught.value.problems
    config.offload.buffers_gib = float(problem.fix.partition("offload.buffers_gib=")[2].partition(",")[0].rstrip("."))
    assert tiers.fragment(config, PARTS, folder="/mnt/x", aio=Aio()).bytes.nvme > 0


def test_deepspeed_extra_comes_last():
    fragment = tiers.fragment(_config("nvme", "none"), PARTS, folder="/mnt/x", aio=Aio())
    ds_config = {"zero_optimization": {"stage": 3}, "aio": {"queue_depth": 3}}
    tiers.complete(ds_config, fragment, {"aio": {"queue_depth": 3}})
    assert ds_config["aio"]["queue_depth"] == 3
    assert ds_config["aio"]["block_size"] == Aio().block_bytes
    assert ds_config["zero_optimization"]["offload_optimizer"]["nvme_path"] == "/mnt/x"
