"""What a checkpoint says of the model it is of, so that it can be exported without the run that wrote it."""

from __future__ import annotations

import json
from typing import Any

from torch import nn
from transformers import PreTrainedModel


def describe_model(module: nn.Module) -> dict[str, Any] | None:
    """The Hugging Face configuration of `module` and the type it is trained in, as JSON; None for any other model.

    `use_cache` is left out: training turns it off, and whoever generates text wants the default.
    """
    module = getattr(module, "hf", module)  # the model around a pipeline stage
    if not isinstance(module, PreTrainedModel):
        return None
    config = json.loads(module.config.to_json_string(use_diff=True))
    config["architectures"] = [type(module).__name__]
    description: dict[str, Any] = {
        "config": _generating(config),
        "dtype": str(next(module.parameters()).dtype).partition(".")[2],
    }
    if module.can_generate() and module.generation_config is not None:
        description["generation_config"] = _generating(json.loads(module.generation_config.to_json_string(use_diff=True)))
    return description


def _generating(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != "use_cache"}
