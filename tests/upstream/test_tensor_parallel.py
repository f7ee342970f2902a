"""What DeepSpeed 0.19.8 does under tensor parallelism that `parallel/tensor.py` and `parallel/groups.py` are made for."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from helpers.ranks import run_ranks
from helpers.upstream import still

pytestmark = pytest.mark.dist


def test_the_layers_have_what_ours_override() -> None:
    """module_inject/layers.py:561 and after: what `_Cut` puts in the place of their own cutting."""
    from deepspeed.module_inject import layers

    for name in ("_mark_uc_metadata", "_should_materialize_tp_partition", "_freeze_partition_sizes"):
        assert hasattr(layers.TensorParallel_Layer, name)
    for cls in (layers.LinearLayer, layers.LinearAllreduce, layers.VocabParallelEmbedding):
        source = inspect.getsource(cls.__init__)
        assert "self._freeze_partition_sizes(" in source
        assert "self._should_materialize_tp_partition()" in source
    assert list(inspect.signature(layers.RowParallel.forward).parameters) == ["ctx", "group", "input", "is_inference_mode"]
    assert list(inspect.signature(layers.ColumnParallel.forward).parameters) == ["ctx", "group", "input"]
    assert list(inspect.signature(layers.GatherFromTensorParallelRegion.forward).parameters)[1:] == [
        "group",
        "input",
        "partition_sizes",
    ]


def test_norms_count_parameters_by_a_mark() -> None:
    """runtime/utils.py `is_model_parallel_parameter`: the attribute that `Sharder._declare` sets."""
    import torch
    from deepspeed.module_inject.layers import DS_TENSOR_MODEL_PARALLEL
    from deepspeed.runtime.utils import is_model_parallel_parameter

    param = torch.nn.Parameter(torch.zeros(1))
    assert not is_model_parallel_parameter(param)
    setattr(param, DS_TENSOR_MODEL_PARALLEL, True)
    assert is_model_parallel_parameter(param)


def test_layers_keep_gathered_weights_by_matmul() -> None:
    """module_inject/layers.py:996: not `F.linear`, which ZeRO-3 replaces by one that keeps no gathered weight."""
    from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer

    matmul = all("torch.matmul(input, self.weight" in inspect.getsource(c.forward) for c in (LinearLayer, LinearAllreduce))
    where = "module_inject/layers.py:996"
    still(matmul, where, "torch.matmul(input, self.weight", "parallel/tensor.py: ColumnLinear.forward, RowLinear.forward")


def _data_ranks() -> tuple[int, int]:
    """On a rank: how many ranks DeepSpeed divides a batch over at tp 2, without and with our mpu."""
    import torch.distributed as dist
    from deepspeed.runtime.config import DeepSpeedConfig

    from anyshard.parallel.groups import create_groups
    from anyshard.parallel.topology import Mesh

    config: dict[str, Any] = {"train_batch_size": 4, "tensor_parallel": {"autotp_size": 2}}
    groups = create_groups(Mesh(dp=1, tp=2), dist.get_rank())
    return DeepSpeedConfig(dict(config)).world_size, DeepSpeedConfig(dict(config), mpu=groups.mpu()).world_size


def test_a_batch_is_divided_over_all_ranks_without_an_mpu() -> None:
    """Every rank counts as data-parallel."""
    for without, with_ours in run_ranks(_data_ranks, 2):
        where = "runtime/config.py:471"
        still(without == 2, where, "self.world_size = dist.get_world_size()", "parallel/groups.py: Groups.mpu")
        assert with_ours == 1


def test_the_loss_of_a_split_vocabulary_takes_what_we_give_it() -> None:
    """sequence/cross_entropy.py:61, and the wait at each call that has us leave its public wrapper out."""
    from deepspeed.sequence import cross_entropy

    arguments = list(inspect.signature(cross_entropy._VocabParallelCrossEntropy.forward).parameters)
    assert arguments[1:] == [
        "vocab_parallel_logits",
        "target",
        "tp_group",
        "vocab_start_index",
        "vocab_end_index",
        "ignore_index",
    ]
    waits = "invalid_target.any().item()" in inspect.getsource(cross_entropy.vocab_parallel_cross_entropy)
    still(waits, "sequence/cross_entropy.py:245", "invalid_target.any().item()", "parallel/vocabulary.py: cross_entropy")
