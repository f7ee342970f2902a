"""What `trainer/models/fill.py` and `pretrained.py` stand on inside transformers 5.23."""

from __future__ import annotations

import dataclasses
import inspect

import torch
from transformers import PreTrainedModel, initialization
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key
from transformers.utils.loading_report import LoadStateDictInfo


def test_marked_tensors_are_left_alone() -> None:
    """initialization.py:52: every function looks at `_is_hf_initialized`."""
    tensor = torch.zeros(3)
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    with initialization.guard_torch_init_functions():
        torch.nn.init.ones_(tensor)
    assert torch.equal(tensor, torch.zeros(3))


def test_initialize_weights_visits_children_first() -> None:
    """modeling_utils.py:2399: the line of a module is itself and those around it, innermost first."""
    source = inspect.getsource(PreTrainedModel.initialize_weights)
    assert source.index("for child in module.children()") < source.index("fn(module, is_custom_code)")
    assert "smart_apply(child, child._initialize_weights, is_custom_code)" in source


def test_models_on_meta_are_tied_and_not_initialised() -> None:
    """modeling_utils.py:3098."""
    source = inspect.getsource(PreTrainedModel.init_weights)
    assert 'torch.device("meta")' in source
    assert "self.tie_weights(recompute_mapping=False)" in source


def test_the_conversion_of_checkpoints_has_the_same_interface() -> None:
    """core_model_loading.py:1521 and 1231, conversion_mapping.py:2615, loading_report.py:156."""
    assert list(inspect.signature(rename_source_key).parameters)[:5] == [
        "source_key",
        "weight_renamings",
        "weight_converters",
        "base_model_prefix",
        "meta_state_dict",
    ]
    assert list(inspect.signature(WeightConverter.add_tensor).parameters) == [
        "self",
        "target_key",
        "source_key",
        "source_pattern",
        "future",
    ]
    assert list(inspect.signature(WeightConverter.convert).parameters)[:4] == ["self", "layer_name", "model", "config"]
    assert next(iter(inspect.signature(get_model_conversion_mapping).parameters)) == "model"
    assert [field.name for field in dataclasses.fields(LoadStateDictInfo)] == [
        "missing_keys",
        "unexpected_keys",
        "mismatched_keys",
        "error_msgs",
        "conversion_errors",
        "skipped_pp_keys",
    ]
