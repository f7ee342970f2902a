"""Partition parameters for ZeRO-3 while the model is being built, before `deepspeed.initialize` sees it.

DeepSpeed's own ways are `zero.Init` around the constructor, which cannot fill a model from the meta device, and `initialize`,
which starts from the full model on every rank. This one takes finished parameters, a few at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import Init, is_zero_param
from torch import nn

from anyshard.parallel.groups import Groups


def gather_as_one(model: nn.Module, modules: list[nn.Module]) -> None:
    """Have ZeRO-3 gather all parameters of each of these modules once, however often their own modules are called.

    Source: deepspeed 0.19.8 utils/z3_leaf_module.py; it marks all modules of their classes.
    """
    from deepspeed.utils import set_z3_leaf_modules

    set_z3_leaf_modules(model, list({type(module) for module in modules}))


class Zero3Partitioner:
    """Turns parameters that have their values into this rank's part of them; `deepspeed.initialize` then keeps them so.

    Afterwards a parameter is empty, its part is in `ds_tensor`, its global shape in `ds_shape`; a tied parameter is still one.

    Args:
        ds_config: the DeepSpeed configuration that `deepspeed.initialize` will get.
        dtype: type of the parameters that will be given.
        groups: over whose data-parallel ranks they are partitioned.

    Collective: every rank of the data-parallel group makes one and calls it with the same parameters in the same order; it
    blocks (rank 0 broadcasts each parameter).

    Source: deepspeed 0.19.8 runtime/zero/partition_parameters.py:1209, `Init._convert_to_zero_parameters`, the only private
    name used; parameter_offload.py:258 gives it the parameters that are not partitioned yet in the same way.
    """

    def __init__(self, ds_config: dict[str, Any], dtype: torch.dtype, groups: Groups) -> None:
        self._dtype = dtype
        # given a module, if only an empty one, DeepSpeed replaces torch's linear by one that saves no gathered weight
        self._init = Init(module=nn.Module(), config_dict_or_path=ds_config, data_parallel_group=groups.dp, mpu=groups.mpu())

    def __call__(self, params: list[nn.Parameter]) -> None:
        """Partition `params`; those that are partitioned already stay."""
        assert all(is_zero_param(param) or param.dtype == self._dtype for param in params)
        self._init._convert_to_zero_parameters(params)
