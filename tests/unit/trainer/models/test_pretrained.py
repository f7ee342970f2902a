"""Weights from safetensors: bit-equal to from_pretrained, and one clear error for each checkpoint that does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import SMALL, small_config
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from anyshard.configs import schema
from anyshard.configs.errors import ConfigError
from anyshard.trainer.models.fill import Filler, Slot
from anyshard.trainer.models.hf import build
from anyshard.trainer.models.pretrained import PretrainedTensors

FAMILIES = sorted(SMALL)


def _saved(family: str, folder: Path, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SMALL[family]), dtype=torch.float32)
    for param in model.parameters():
        param.data.normal_()  # so that biases and norms differ from what initialisation gives
    model.save_pretrained(folder, **options)
    return model


def _load(path: Path | str, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    config = small_config("llama", config={}, path=str(path), init=schema.Init.pretrained)
    return build(config, device=torch.device("cpu"), dtype=dtype, **options)


def _rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "60KB"}], ids=["one_file", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loads_what_from_pretrained_loads(family: str, options: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    _saved(family, tmp_path, **options)
    assert (tmp_path / "model.safetensors").exists() == (not options)
    ours, usual = _load(tmp_path, dtype), AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in usual.named_parameters()]
    for (name, tensor), other in zip(ours.state_dict().items(), usual.state_dict().values(), strict=True):
        assert tensor.dtype == other.dtype
        assert torch.equal(tensor, other), name
    for (name, tensor), other in zip(ours.named_buffers(), usual.buffers(), strict=True):
        assert torch.equal(tensor, other), name


@pytest.mark.parametrize("family", FAMILIES)
def test_partition_gets_each_parameter_once_before_the_next_is_read(family: str, tmp_path: Path) -> None:
    model = _saved(family, tmp_path)
    seen: dict[int, torch.Tensor] = {}

    def partition(params: list[nn.Parameter]) -> None:
        assert len(params) == 1
        assert id(params[0]) not in seen
        seen[id(params[0])] = params[0].detach().clone()
        params[0].data = torch.empty(0)

    loaded = _load(tmp_path, partition=partition)
    reference = dict(model.named_parameters())
    assert {name for name, param in loaded.named_parameters() if torch.equal(seen[id(param)], reference[name])} == set(
        reference
    )


def test_a_base_model_and_a_model_without_its_prefix_load_too(tmp_path: Path) -> None:
    model = _saved("gpt2", tmp_path)

    def strip(tensors: dict[str, torch.Tensor]) -> None:  # as openai-community/gpt2 is stored
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    _rewrite(tmp_path, strip)
    loaded = _load(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_a_tied_head_may_be_stored_but_not_differ(tmp_path: Path) -> None:
    _saved("qwen3", tmp_path)
    _rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    model = _load(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    _rewrite(tmp_path, lambda tensors: tensors["lm_head.weight"].add_(1))
    with pytest.raises(ConfigError, match=r"different values for .*lm_head.weight.*tie_word_embeddings=false"):
        _load(tmp_path)


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    _saved("llama", tmp_path)
    _rewrite(tmp_path, lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.1." in name])
    with pytest.raises(ConfigError, match=r"lacks model.layers.1.input_layernorm.weight, .* and 4 more"):
        _load(tmp_path)


def test_a_missing_expert_is_found(tmp_path: Path) -> None:
    _saved("mixtral", tmp_path)
    _rewrite(tmp_path, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".0." in name and "experts.3." in name])
    with pytest.raises(ConfigError, match=r"model.layers.0.mlp.experts"):
        _load(tmp_path)


def test_an_expert_of_another_width_is_found(tmp_path: Path) -> None:
    _saved("mixtral", tmp_path)
    name = next(name for name in load_file(tmp_path / "model.safetensors") if "experts.3." in name)
    _rewrite(tmp_path, lambda tensors: tensors.update({name: torch.zeros(2, 2)}))
    with pytest.raises(ConfigError, match=r"parts of model.layers.0.mlp.experts.* that do not fit together"):
        _load(tmp_path)


def test_left_over_tensors_are_named(tmp_path: Path) -> None:
    _saved("llama", tmp_path)
    _rewrite(tmp_path, lambda tensors: tensors.update({"model.layers.9.extra.weight": torch.zeros(2)}))
    with pytest.raises(ConfigError, match=r"has model.layers.9.extra.weight, which the model has not"):
        _load(tmp_path)


def test_another_shape_is_named(tmp_path: Path) -> None:
    _saved("llama", tmp_path)
    _rewrite(tmp_path, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(3)}))
    with pytest.raises(ConfigError, match=r"has model.norm.weight of shape \(3,\), the model of \(64,\)"):
        _load(tmp_path)


def test_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL["llama"]))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match="its weights are pickle, which can run any code"):
        _load(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL["llama"]))
    with pytest.raises(ConfigError, match=r"holds no weights.*model.init=random"):
        _load(tmp_path)


def test_an_incomplete_download_is_refused(tmp_path: Path) -> None:
    _saved("llama", tmp_path, max_shard_size="60KB")
    next(tmp_path.glob("model-00002-of-*.safetensors")).unlink()
    with pytest.raises(ConfigError, match=r"model-00002-of-.*safetensors of its model.safetensors.index.json is not there"):
        _load(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_a_damaged_file_is_refused(name: str, tmp_path: Path) -> None:
    _saved("llama", tmp_path, **({} if name == "model.safetensors" else {"max_shard_size": "60KB"}))
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(ConfigError, match="cannot be read"):
        _load(tmp_path)


def test_weights_of_an_unreachable_hub_id_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from anyshard.trainer.models.pretrained import weights_folder

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"model.path=nobody/nothing.*the hub gives none"):
        weights_folder("nobody/nothing")


def test_a_config_file_points_at_the_weights_beside_it(tmp_path: Path) -> None:
    _saved("llama", tmp_path)
    lines: list[str] = []
    loaded = _load(tmp_path / "config.json", say=lines.append).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in _load(tmp_path).state_dict().items())
    assert str(tmp_path) in lines[0]


def _tensors(folder: Path) -> tuple[PretrainedTensors, dict[str, Slot]]:
    config = small_config("llama", path=str(folder), config={})
    model = build(config, device=torch.device("meta"), dtype=torch.float32)
    filler = Filler(model, device=torch.device("cpu"), dtype=torch.float32, partition=None)
    return PretrainedTensors(filler, str(folder)), {name: slot for slot in filler.slots for name in slot.names}


@pytest.mark.parametrize("family", SMALL)
def test_tensors_in_any_order_are_those_of_the_model(family: str, tmp_path: Path) -> None:
    model = _saved(family, tmp_path)
    tensors, slots = _tensors(tmp_path)
    for name, param in reversed(list(model.named_parameters())):
        assert torch.equal(tensors.read(slots[name]), param)
        assert torch.equal(tensors.read(slots[name]), param)  # again: nothing is used up


def test_tensors_that_do_not_fit_are_refused_when_they_are_read(tmp_path: Path) -> None:
    _saved("qwen3", tmp_path)
    _rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}))
    tensors, slots = _tensors(tmp_path)
    with pytest.raises(ConfigError, match="different values for"):
        tensors.read(slots["lm_head.weight"])
    _rewrite(tmp_path, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(3)}))
    tensors, slots = _tensors(tmp_path)
    with pytest.raises(ConfigError, match=r"model.norm.weight of shape \(3,\)"):
        tensors.read(slots["model.norm.weight"])
