"""What is exported, `from_pretrained` opens, and the model computes the same bit for bit."""

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.interop import FAMILIES, silent, small_model, write_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from anyshard.configs.errors import CheckpointError, ConfigError
from anyshard.configs.frozen import freeze
from anyshard.configs.schema import Config, Data, Model
from anyshard.trainer.checkpoint.interop.hf_export import export_hf
from anyshard.trainer.checkpoint.interop.source import Stored
from anyshard.trainer.data.tokenizers import ByteTokenizer, save_tokenizer


def export(path: Path, out: Path, **options: Any) -> dict[str, Any]:
    arguments = {"dtype": None, "max_shard_bytes": 2**30, "config_file": None, "report": silent, **options}
    return export_hf(Stored(path), out, **arguments)


def names_in(folder: Path) -> set[str]:
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
    return names


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_shard_bytes", [2**30, 50_000])
def test_the_model_comes_back_bit_for_bit(tmp_path: Path, family: str, max_shard_bytes: int) -> None:
    model = small_model(family)
    path = write_model(tmp_path, model)
    result = export(path, tmp_path / "out", max_shard_bytes=max_shard_bytes)
    loaded, told = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told.values()), told
    assert type(loaded) is type(model)
    assert loaded.dtype is torch.float32
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    model.save_pretrained(tmp_path / "theirs")
    assert names_in(tmp_path / "out") == names_in(tmp_path / "theirs")
    assert len(result["files"]) == (1 if max_shard_bytes == 2**30 else len(list((tmp_path / "out").glob("*.safetensors"))))
    assert (len(result["files"]) > 3) == (max_shard_bytes == 50_000)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == (max_shard_bytes == 50_000)
    assert loaded.config.use_cache
    assert (tmp_path / "out" / "generation_config.json").exists()


def test_the_index_is_that_of_save_pretrained(tmp_path: Path) -> None:
    model = small_model("qwen3")
    export(write_model(tmp_path, model), tmp_path / "out", max_shard_bytes=50_000)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=50_000)
    ours, theirs = (json.loads((tmp_path / each / "model.safetensors.index.json").read_text()) for each in ("out", "theirs"))
    assert ours["metadata"] == theirs["metadata"]
    assert set(ours["weight_map"]) == set(theirs["weight_map"])


def test_another_type(tmp_path: Path) -> None:
    model = small_model("llama")
    path = write_model(tmp_path, model)
    assert export(path, tmp_path / "out", dtype="bfloat16")["dtype"] == "bfloat16"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype is torch.bfloat16
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.bfloat16())


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref] = []
    most = 0
    read = Stored.read

    def watched(self: Stored, key: tuple[str, str]) -> torch.Tensor:
        nonlocal most
        most = max(most, sum(each() is not None for each in alive))
        tensor = read(self, key)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(Stored, "read", watched)
    export(write_model(tmp_path, small_model("mixtral")), tmp_path / "out")
    assert len(alive) > 20
    assert most <= 1


def test_what_a_checkpoint_does_not_say_the_run_does(tmp_path: Path) -> None:
    model = small_model("llama")
    path = write_model(tmp_path / "checkpoints", model, meta={})
    with pytest.raises(ConfigError, match="does not say that it is of a Hugging Face model"):
        export(path, tmp_path / "out")
    config = Config(model=Model(config=json.loads(model.config.to_json_string())), data=Data(sequence_length=32))
    freeze(config, [], tmp_path)
    save_tokenizer(ByteTokenizer(), tmp_path / "tokenizer")
    assert export(path, tmp_path / "out")["notes"] == []
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "tschüß, 東京\n\n  <|endoftext|>"
    assert tokenizer(text, split_special_tokens=True)["input_ids"] == list(text.encode())
    freeze(Config(model=Model(builder="plugin")), [], tmp_path)
    with pytest.raises(ConfigError, match="does not say that it is of a Hugging Face model"):
        export(path, tmp_path / "other")
    elsewhere = shutil.copytree(path, tmp_path / "moved" / path.name)
    model.config.save_pretrained(tmp_path / "asked")
    asked = tmp_path / "asked" / "config.json"
    assert "no tokenizer" in export(elsewhere, tmp_path / "third", config_file=asked)["notes"][0]
    with pytest.raises(ConfigError, match=r"--config=.*cannot be read"):
        export(elsewhere, tmp_path / "fourth", config_file=tmp_path / "nothing.json")
    assert not (tmp_path / "fourth").exists()


def test_the_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    llama, qwen = small_model("llama"), small_model("qwen3")
    path = write_model(tmp_path, llama)
    qwen.config.save_pretrained(tmp_path / "qwen")
    with pytest.raises(
        CheckpointError,
        match=r"Qwen3ForCausalLM configured: .*q_proj.weight has shape \(64, 64\) in the checkpoint and \(128, 64\)",
    ):
        export(path, tmp_path / "out", config_file=tmp_path / "qwen" / "config.json")
    for changes, reason in (
        ({"hidden_size": 32}, r"has shape \(272, 64\) in the checkpoint and \(272, 32\) in the model"),
        ({"num_hidden_layers": 2}, "layers.2.* is not in the model"),
        ({"num_hidden_layers": 4}, "layers.3.* is not in the checkpoint"),
    ):
        config = {**json.loads(llama.config.to_json_string()), **changes}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=reason):
            export(path, tmp_path / "out", config_file=tmp_path / "config.json")
    (tmp_path / "config.json").write_text('{"model_type": "no such"}')
    with pytest.raises(ConfigError, match="makes no model here"):
        export(path, tmp_path / "out", config_file=tmp_path / "config.json")
    config = {**json.loads(llama.config.to_json_string()), "architectures": ["LlamaForSequenceClassification"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="the model is a LlamaForSequenceClassification, and causal language models alone"):
        export(path, tmp_path / "out", config_file=tmp_path / "config.json")
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    path = write_model(tmp_path / "run", small_model("llama"))
    data = path / "rank-00000.bin"
    data.write_bytes(bytes(800) + data.read_bytes()[800:])
    with pytest.raises(CheckpointError, match=r"rank-00000.bin, bytes .*checksum mismatch"):
        export(path, tmp_path / "out")
    data.unlink()
    with pytest.raises(CheckpointError, match=r"rank-00000.bin: cannot be read"):
        export(path, tmp_path / "out")
    assert [each.name for each in tmp_path.iterdir()] == ["run"]
