"""data.pack=documents keeps documents apart in every model family of the presets, by position_ids alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from anyshard.trainer.data.loader import collate_tokens
from anyshard.trainer.data.tokens import TokenDataset
from anyshard.trainer.lm import causal_lm_loss, count_targets

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _SIZES,
    "qwen3": {**_SIZES, "head_dim": 8},
    "mixtral": {**_SIZES, "num_local_experts": 2, "num_experts_per_tok": 1},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
LENGTHS = [5, 1, 9, 17]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_loss_is_that_of_the_documents_alone(family: str, attention: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=64, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    tokens = np.random.default_rng(0).integers(0, 64, sum(LENGTHS), dtype=np.uint16)
    ends = np.cumsum(LENGTHS)
    data = TokenDataset(tokens, ends, sequence_length=len(tokens) - 1, separate_documents=True)
    packed = collate_tokens([data[0]])
    with torch.no_grad():
        loss = causal_lm_loss(model, packed)
        total, targets = 0.0, 0
        for document in np.split(tokens, ends[:-1]):
            if len(document) > 1:
                ids = torch.from_numpy(document.astype(np.int64))[None]
                alone = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
                total += float(causal_lm_loss(model, alone)) * (len(document) - 1)
                targets += len(document) - 1
    assert int(count_targets(packed)) == targets
    assert float(loss) == pytest.approx(total / targets, rel=1e-5)
