"""What DeepSpeed 0.19.8 does under a pipeline that `parallel/pipeline.py` and `trainer/pipeline_engine.py` are made for."""

from __future__ import annotations

import inspect

from helpers.upstream import still


def test_stages_2_and_3_are_refused() -> None:
    still(True, "runtime/pipe/engine.py:77", "ZeRO-2 and ZeRO-3 are incompatible", "configs/rules_pipeline.py")


def test_gradients_are_reduced_once_at_the_end() -> None:
    """Hence no overlap_comm, and the model's own type of gradients for shared weights."""
    still(True, "runtime/pipe/engine.py:80", "self.enable_backward_allreduce = False", "trainer/ds_config.py (overlap_comm)")
    still(True, "runtime/pipe/engine.py:283", "weight._hp_grad if self.using_bf16_optimizer", "configs/rules_pipeline.py")


def test_shared_weights_are_asked_of_the_module() -> None:
    where = "parallel/pipeline.py (get_tied_weights_and_groups)"
    still(True, "runtime/pipe/engine.py:281", "self.module.get_tied_weights_and_groups()", where)


def test_the_last_stage_may_compute_the_loss_itself() -> None:
    still(True, "runtime/pipe/engine.py:760", "self.loss = outputs", "parallel/pipeline.py (Pipeline.forward)")


def test_layers_may_be_functions_that_are_not_registered() -> None:
    from deepspeed.runtime.pipe.module import PipelineModule

    assert "self.forward_funcs.append(layer)" in inspect.getsource(PipelineModule._build)


def test_stage_0_drops_the_norm_and_counts_unmarked_parameters_of_the_first_rank_only() -> None:
    still(True, "runtime/pipe/engine.py:1227", "self._take_model_step(lr_kwargs)", "trainer/pipeline_engine.py")
    still(True, "runtime/engine.py:3503", "clip_grad_norm_(", "trainer/pipeline_engine.py (_note_norm_and_step)")
    still(True, "runtime/utils.py:394", "is_model_parallel_parameter(p)", "parallel/pipeline.py (Pipeline._declare)")
    still(True, "runtime/zero/stage_1_and_2.py:1919", "ds_pipe_replicated", "parallel/pipeline.py (Pipeline._declare)")


def test_topologies_may_have_any_order_of_axes() -> None:
    """`topology_of` gives the order of our mesh; their own classes have a fixed one."""
    from deepspeed.runtime.pipe.topology import ProcessTopology

    topology = ProcessTopology(["data", "pipe", "model"], [2, 2, 1])
    assert [topology.get_coord(rank).pipe for rank in range(4)] == [0, 1, 0, 1]
