"""`offload=auto`: what it comes to on given hardware, and what the plan of a drive holds."""

from __future__ import annotations

import pytest

from anyshard import compose, plan
from anyshard.configs.errors import ConfigError, PlanError
from anyshard.configs.schema import Device
from anyshard.launch.plan import settled

BASE = ["model=llama_15m", "data=synthetic", "zero=z3", "launch.procs_per_node=1", "offload.buffers_gib=0.2"]


def _auto(tmp_path, *more):
    return compose([*BASE, "offload=auto", f"offload.nvme_path={tmp_path}", *more])


def test_everything_stays_where_there_is_room(tmp_path):
    said = []
    config = settled(_auto(tmp_path), said.append)
    assert (config.offload.auto, config.offload.optimizer, config.offload.param) == (False, Device.none, Device.none)
    assert said[0].splitlines()[0].endswith("chosen")
    assert settled(config, said.append) is config
    assert plan(_auto(tmp_path)).config.offload.optimizer is Device.none


def test_with_a_small_device_the_optimizer_moves_and_the_reasons_are_told(tmp_path):
    said = []
    config = settled(_auto(tmp_path, "cluster.device_memory_gib=0.2"), said.append)
    assert config.offload.optimizer is not Device.none
    assert "offload=none" in said[0]
    assert "on the device, where there are 0.20" in said[0]


def test_nothing_fits(tmp_path):
    with pytest.raises(PlanError, match=r"(?s)no placement fits.*offload=nvme_param.*Use more ranks"):
        settled(_auto(tmp_path, "cluster.device_memory_gib=0.001"))


def test_the_plan_of_a_drive(tmp_path):
    planned = plan(compose([*BASE, "offload=nvme", f"offload.nvme_path={tmp_path}"]))
    memory = planned.memory
    assert memory.optimizer_on_nvme
    assert memory.nvme_bytes == pytest.approx(memory.optimizer, rel=0.01)
    assert memory.swap_host < 0.21 * 2**30
    assert planned.ds_config["zero_optimization"]["offload_optimizer"]["buffer_count"] == 12
    planned.show()


def test_buffers_that_cannot_hold_the_model_are_refused_before_launch(tmp_path):
    with pytest.raises(ConfigError, match=r"Set offload\.buffers_gib="):
        plan(compose([*BASE, "offload=nvme_param", f"offload.nvme_path={tmp_path}", "offload.buffers_gib=0.01"]))
