"""Small models of each family that has a preset, as configurations."""

from __future__ import annotations

from typing import Any

from anyshard.configs import schema

SMALL: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "vocab_size": 272,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 272,
        "n_positions": 128,
        "n_embd": 64,
        "n_layer": 3,
        "n_head": 4,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "qwen3": {
        "model_type": "qwen3",
        "vocab_size": 272,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "tie_word_embeddings": True,
    },
    "mixtral": {
        "model_type": "mixtral",
        "vocab_size": 272,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
}


_COMMON = {
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
SPLIT_ONLY: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2", **_COMMON, "num_key_value_heads": 2},
    "mistral": {"model_type": "mistral", **_COMMON, "num_key_value_heads": 2, "sliding_window": 8},
    "gemma": {"model_type": "gemma", **_COMMON, "num_key_value_heads": 2, "head_dim": 16},
    "gemma2": {"model_type": "gemma2", **_COMMON, "num_key_value_heads": 2, "head_dim": 16},
    "gemma3": {"model_type": "gemma3_text", **_COMMON, "num_key_value_heads": 2, "head_dim": 16},
    "gpt_neox": {"model_type": "gpt_neox", **_COMMON},
    "phi": {"model_type": "phi", **_COMMON, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0},
    "opt": {
        "model_type": "opt",
        **{name: value for name, value in _COMMON.items() if name != "intermediate_size"},
        "ffn_dim": 128,
        "word_embed_proj_dim": 64,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    },
}
"""Families without a preset that tensor parallelism is tested with as well."""


def small_config(family: str, *, seed: int = 42, sequence_length: int = 32, **model: Any) -> schema.Config:
    """A run of the small model of a family; `model` holds other keys of the model group."""
    model.setdefault("config", {**SMALL, **SPLIT_ONLY}[family])
    return schema.Config(seed=seed, model=schema.Model(**model), data=schema.Data(sequence_length=sequence_length))
