"""What every preset and every builder of models must do; a new preset is tested by its file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.models import SMALL, small_config

import anyshard.configs
from anyshard.configs import schema
from anyshard.configs.registry import lookup, names
from anyshard.trainer.models.hf import build, hf_config
from anyshard.trainer.models.param_table import ParamTable, read_answer, request
from anyshard.trainer.models.table import table_of

FOLDER = Path(anyshard.configs.__file__).parent / "model"
PRESETS = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "hf")
META, CPU = torch.device("meta"), torch.device("cpu")

PUBLISHED = {
    "llama_1b": 1_235_814_400,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "gpt2_124m": 124_439_808,
    "qwen3_0_6b": 596_049_920,
    "mixtral_8x7b": 46_702_792_704,
}
"""Parameters of the published checkpoints, tied ones once (model.safetensors.index.json and model cards)."""
SIZED = {"tiny": 182_848, "llama_15m": 14_684_672, "llama_125m": 123_587_328, "llama_350m": 359_842_816}
"""Parameters of the presets that are ours."""


def preset(name: str, **changes: Any) -> schema.Config:
    """The preset, with some fields of `model.config` changed."""
    raw = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    raw["config"] = {**raw["config"], **changes}
    return schema.Config(model=schema.Model(**raw), data=schema.Data(sequence_length=32))


def _shrunk(name: str) -> schema.Config:
    """The preset's architecture and options at a size for tests."""
    config = preset(name).model.config
    sizes = SMALL[config["model_type"]]
    shape = {key: sizes[key] for key in config if key in sizes and key not in ("rope_parameters", "tie_word_embeddings")}
    return preset(name, **shape, bos_token_id=None, eos_token_id=None)


def test_every_preset_has_a_known_size() -> None:
    assert set(PRESETS) == {*PUBLISHED, *SIZED}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_its_name_and_the_parameters_that_were_published(name: str) -> None:
    config = preset(name)
    assert config.model.name == name
    table = table_of(build(config, device=META, dtype=torch.float32))
    assert table.num_params == {**PUBLISHED, **SIZED}[name]
    assert ParamTable.from_json(table.to_json()) == table


@pytest.mark.parametrize("name", PRESETS)
def test_the_dimensions_of_the_table_are_those_of_the_configuration(name: str) -> None:
    config = preset(name)
    table, hf = table_of(build(config, device=META, dtype=torch.float32)), hf_config(config.model, config.data)
    assert (table.hidden_size, table.num_layers, table.num_heads) == (
        hf.hidden_size,
        hf.num_hidden_layers,
        hf.num_attention_heads,
    )
    assert table.num_kv_heads == getattr(hf, "num_key_value_heads", table.num_heads)
    assert table.head_dim == (getattr(hf, "head_dim", None) or table.hidden_size // table.num_heads)
    assert table.vocab_size == hf.vocab_size
    assert table.max_positions == hf.max_position_embeddings
    assert bool(table.num_experts) == bool(table.expert_names) == bool(table.experts_per_token)
    assert bool(table.tied) == bool(hf.tie_word_embeddings)
    assert table.num_embedding_params >= table.vocab_size * table.hidden_size


def test_the_child_process_gives_the_same_table() -> None:
    config = preset("mixtral_8x7b")
    command = [sys.executable, "-m", "anyshard.trainer.models.table"]
    done = subprocess.run(
        command, input=request(config.model, config.data), capture_output=True, text=True, timeout=120, check=True
    )
    assert read_answer(done.stdout) == table_of(build(config, device=META, dtype=torch.float32))


@pytest.mark.parametrize("name", PRESETS)
def test_a_small_one_learns(name: str) -> None:
    model = build(_shrunk(name), device=CPU, dtype=torch.float32)
    ids = torch.randint(0, model.config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    assert model(input_ids=ids).logits.shape == (2, 32, model.config.vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", PRESETS)
def test_a_small_one_comes_back_from_a_folder(name: str, tmp_path: Path) -> None:
    config = _shrunk(name)
    model = build(config, device=CPU, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    config.model.path, config.model.init, config.model.config, config.seed = str(tmp_path), schema.Init.pretrained, {}, 7
    again = build(config, device=CPU, dtype=torch.float32)
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", names("model"))
def test_a_builder_builds_on_meta_and_depends_on_the_seed_alone(name: str) -> None:
    builder = lookup("model", name, key="model.builder")
    options: dict[str, Any] = {"dtype": torch.float32, "partition": None, "say": lambda _: None}
    meta = builder(small_config("llama"), device=META, **options)
    assert all(param.is_meta for param in meta.parameters())
    torch.manual_seed(1)
    first = builder(small_config("llama"), device=CPU, **options).state_dict()
    torch.manual_seed(2)
    second = builder(small_config("llama"), device=CPU, **options).state_dict()
    other = builder(small_config("llama", seed=1), device=CPU, **options).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)
