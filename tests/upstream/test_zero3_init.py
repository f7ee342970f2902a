"""What `parallel/zero3.py` stands on in DeepSpeed: runtime/zero/partition_parameters.py and parameter_offload.py of 0.19.8."""

from __future__ import annotations

import inspect

from deepspeed.runtime.zero import parameter_offload, partition_parameters
from deepspeed.runtime.zero.partition_parameters import Init


def test_init_converts_a_list_of_parameters() -> None:
    """partition_parameters.py:1209: skips what is partitioned, moves, broadcasts and partitions one parameter after another."""
    assert list(inspect.signature(Init._convert_to_zero_parameters).parameters) == ["self", "param_list"]
    source = inspect.getsource(Init._convert_to_zero_parameters)
    assert "if is_zero_param(param):" in source
    assert "self._zero_init_param(param)" in source
    assert "param.partition()" in inspect.getsource(Init._zero_init_param)


def test_initialize_takes_partitioned_parameters_as_they_are() -> None:
    """parameter_offload.py:258: only the parameters that are not partitioned yet are converted."""
    source = inspect.getsource(parameter_offload.DeepSpeedZeRoOffload._convert_to_zero_parameters)
    assert "[p for p in module.parameters() if not is_zero_param(p)]" in source


def test_the_linear_that_saves_no_weight_comes_with_a_module() -> None:
    """partition_parameters.py:1058: without a module, torch's linear would keep every gathered weight until the backward."""
    source = inspect.getsource(Init.__init__)
    assert "if module is not None and self.enabled and self.mem_efficient_linear:" in source
    assert partition_parameters.zero3_linear_wrap is not None
