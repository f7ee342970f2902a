"""The Hugging Face builder: the same model as transformers makes, and one clear error for each that it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import SMALL, small_config
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from anyshard.configs import schema
from anyshard.configs.compose import compose
from anyshard.configs.errors import ConfigError
from anyshard.trainer.models import hf
from anyshard.trainer.models.hf import build, hf_config

CPU = torch.device("cpu")
FAMILIES = sorted(SMALL)


def _build(config: schema.Config, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    return build(config, device=CPU, dtype=dtype, **options)


def _usual(family: str) -> nn.Module:
    """The same model, built by transformers in its own way."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**SMALL[family])
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_the_usual_distribution(family: str) -> None:
    ours, usual = _build(small_config(family)), _usual(family)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in usual.named_parameters()]
    for (name, param), other in zip(ours.named_parameters(), usual.parameters(), strict=True):
        assert param.shape == other.shape
        assert param.requires_grad
        std, expected = param.detach().std().item(), other.detach().std().item()
        # the standard error of a standard deviation is std / sqrt(2 n); four of each of the two
        assert abs(std - expected) <= 8 * expected / (2 * param.numel()) ** 0.5, name
        assert abs(param.detach().mean() - other.detach().mean()) <= 8 * expected / param.numel() ** 0.5, name


def test_gpt2_rescales_the_residual_projections() -> None:
    weights = dict(_build(small_config("gpt2")).named_parameters())
    inner, outer = weights["transformer.h.0.attn.c_attn.weight"], weights["transformer.h.0.attn.c_proj.weight"]
    assert outer.std().item() / inner.std().item() == pytest.approx(1 / 6**0.5, rel=0.05)  # 1 / sqrt(2 * 3 layers)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buffers_equal_those_of_the_usual_model(family: str, dtype: torch.dtype) -> None:
    ours, usual = dict(_build(small_config(family), dtype).named_buffers()), dict(_usual(family).named_buffers())
    assert set(ours) == set(usual)
    for name, buffer in ours.items():
        assert buffer.dtype == usual[name].dtype
        assert torch.equal(buffer, usual[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_depend_on_the_seed_and_their_name_alone(family: str) -> None:
    full = dict(_build(small_config(family)).named_parameters())
    layers = "n_layer" if family == "gpt2" else "num_hidden_layers"
    if family != "gpt2":  # whose scale depends on the depth
        shallow = _build(small_config(family, config={**SMALL[family], layers: 2}))
        assert all(torch.equal(param, full[name]) for name, param in shallow.named_parameters())
    weights = [param for name, param in full.items() if param.dim() > 1]
    assert not any(a.shape == b.shape and torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])


def test_lower_precision_is_the_rounded_float32() -> None:
    full, half = _build(small_config("llama")), _build(small_config("llama"), torch.bfloat16)
    for a, b in zip(full.parameters(), half.parameters(), strict=True):
        assert torch.equal(a.to(torch.bfloat16), b)


def test_building_leaves_the_random_state_and_the_parameters_clean() -> None:
    before = torch.get_rng_state()
    model = _build(small_config("llama"))
    assert torch.equal(before, torch.get_rng_state())
    assert not any(hasattr(tensor, "_is_hf_initialized") for tensor in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("family", FAMILIES)
def test_partition_gets_each_parameter_once_with_its_values_one_module_at_a_time(family: str) -> None:
    seen: dict[int, torch.Tensor] = {}
    model_parameters: list[list[nn.Parameter]] = []

    def partition(params: list[nn.Parameter]) -> None:
        for param in params:
            assert id(param) not in seen
            seen[id(param)] = param.detach().clone()
            param.data = torch.empty(0)  # as ZeRO-3 does: nothing may touch it afterwards
        model_parameters.append(params)

    model = _build(small_config(family), partition=partition)
    reference = dict(_build(small_config(family)).named_parameters())
    assert {
        name: True for name, param in model.named_parameters() if torch.equal(seen[id(param)], reference[name])
    } == dict.fromkeys(reference, True)
    assert len(seen) == len(reference)
    owners = {id(param): name.rpartition(".")[0] for name, param in model.named_parameters()}
    assert all(len({owners[id(param)] for param in params}) == 1 for params in model_parameters)


def test_tied_embeddings_stay_one_parameter() -> None:
    model = _build(small_config("qwen3"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


def test_training_mode_cache_and_checkpointing() -> None:
    config = small_config("llama", attention="eager")
    config.train.activation_checkpointing = True
    model = _build(config)
    assert model.training
    assert model.config.use_cache is False
    assert model.config._attn_implementation == "eager"
    assert any(getattr(part, "gradient_checkpointing", False) for part in model.modules())


def test_a_configuration_file_and_a_folder_make_the_same_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL["llama"]))
    reference = _build(small_config("llama")).state_dict()
    for path in (tmp_path, tmp_path / "config.json"):
        made = _build(small_config("llama", config={}, path=str(path))).state_dict()
        assert all(torch.equal(made[key], reference[key]) for key in reference)
    changed = hf_config(schema.Model(path=str(tmp_path), config={"num_hidden_layers": 1}), schema.Data(sequence_length=8))
    assert changed.num_hidden_layers == 1
    assert changed.hidden_size == SMALL["llama"]["hidden_size"]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"num_hiden_layers": 1},
            "model.config.num_hiden_layers=1: LlamaConfig has no such field. Did you mean num_hidden_layers?",
        ),
        ({"model_type": "gpt2"}, "model.config.model_type=gpt2: the model of model.path="),
        ({"hidden_size": 30}, "not a multiple of the number of attention heads"),
    ],
)
def test_fields_that_do_not_fit_the_model_of_the_path_are_refused(changes: dict[str, Any], text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL["llama"]))
    with pytest.raises(ConfigError) as caught:
        hf_config(schema.Model(path=str(tmp_path), config=changes), schema.Data(sequence_length=8))
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("model", "texts"),
    [
        ({"config": {}}, ["model.config.model_type=null", "nothing says what the model is", "model=llama_15m"]),
        ({"config": {"model_type": "lama"}}, ["model.config.model_type=lama", "Did you mean llama?"]),
        (
            {"config": {"model_type": "llama", "hiden_size": 8, "num_layer": 2}},
            [
                "model.config.hiden_size=8",
                "LlamaConfig has no such field",
                "Did you mean hidden_size?",
                "model.config.num_layer=2",
            ],
        ),
        (
            {"config": {"model_type": "llama", "hidden_size": "wide"}},
            ["model.config=", "transformers refuses it", "hidden_size"],
        ),
        ({"config": {"model_type": "llama", "hidden_size": 30}}, ["model.config=", "not a multiple"]),
        ({"config": {"model_type": "clip"}}, ["model.config.model_type=clip", "no causal language model", "model.builder"]),
        ({"config": SMALL["llama"], "attention": "sdpaa"}, ["model.attention=sdpaa", "transformers refuses it"]),
        ({"path": "/no/such/folder"}, ["model.path=/no/such/folder", "no such file or directory"]),
        ({"path": "nothing.json"}, ["model.path=nothing.json", "no such file"]),
    ],
)
def test_what_makes_no_model_is_refused(model: dict[str, Any], texts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        _build(small_config("llama", **{"config": {}, **model}))
    for text in texts:
        assert text in str(caught.value)


def test_a_hub_id_that_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"model.path=nobody/nothing") as caught:
        _build(small_config("llama", config={}, path="nobody/nothing"))
    assert "Check the id and the network" in str(caught.value)
    assert "hf download nobody/nothing" in str(caught.value)
    assert "the message allows" not in str(caught.value)


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"transformers refuses it.*Set a value that the message allows"):
        _build(small_config("llama", config={}, path=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ConfigError, match=r"transformers refuses it.*Set it to a folder with a whole config\.json"):
        _build(small_config("llama", config={}, path=str(tmp_path)))


def test_code_of_strangers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine"}}))
    (tmp_path / "code.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ConfigError, match="trust_remote_code"):
        _build(small_config("llama", config={}, path=str(tmp_path)))


def test_sequences_longer_than_the_model_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data.sequence_length=256: the model has 128 positions.*data.sequence_length=128"):
        _build(small_config("gpt2", sequence_length=256))


def test_models_without_checkpointing_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.LlamaForCausalLM.supports_gradient_checkpointing", False)
    monkeypatch.setattr(hf.PreTrainedModel, "supports_gradient_checkpointing", False)
    config = small_config("llama")
    config.train.activation_checkpointing = True
    with pytest.raises(ConfigError, match=r"train.activation_checkpointing=true"):
        _build(config)


@pytest.mark.parametrize("forgotten", ["parameter", "flag"])
def test_code_that_leaves_a_tensor_without_value_is_found(forgotten: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    usual = modeling_llama.LlamaMLP.__init__

    def init(self: Any, config: Any) -> None:
        usual(self, config)
        if forgotten == "parameter":
            self.extra = nn.Parameter(torch.ones(3))
        else:
            self.register_buffer("extra", torch.ones(3, dtype=torch.int64), persistent=False)

    monkeypatch.setattr(modeling_llama.LlamaMLP, "__init__", init)
    with pytest.raises(ConfigError, match=r"gives model.layers.0.mlp.extra no initial value"):
        _build(small_config("llama"))


def test_a_preset_that_describes_another_model_than_the_path_is_refused(tmp_path: Path) -> None:
    """Merged over the path's configuration, as keys of the user's own are, it would silently hide it."""
    AutoConfig.for_model(**SMALL["llama"]).save_pretrained(tmp_path)
    preset = compose(["model=llama_15m", f"model.path={tmp_path}"])
    with pytest.raises(ConfigError, match=r"model\.path=.*model=llama_15m describes another model: .*Use model=hf"):
        hf_config(preset.model, preset.data)
    own = compose(["model=hf", f"model.path={tmp_path}", "model.config.num_hidden_layers=1"])
    assert hf_config(own.model, own.data).num_hidden_layers == 1
