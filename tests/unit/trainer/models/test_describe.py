import json

import pytest
import torch
from helpers.interop import FAMILIES, small_model
from torch import nn
from transformers import AutoConfig, GenerationConfig

from anyshard.trainer.models.describe import describe_model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_configuration_comes_back(family: str) -> None:
    model = small_model(family).to(torch.bfloat16)
    described = json.loads(json.dumps(describe_model(model)))
    assert described["dtype"] == "bfloat16"
    config = AutoConfig.for_model(**described["config"])
    assert config.architectures == [type(model).__name__]
    same = {**model.config.to_dict(), "use_cache": True, "architectures": config.architectures}
    assert {**config.to_dict(), "dtype": None} == {**same, "dtype": None}
    assert GenerationConfig(**described["generation_config"]).use_cache in (True, None)


def test_another_model_has_no_description() -> None:
    assert describe_model(nn.Linear(2, 2)) is None
