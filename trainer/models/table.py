"""Child process of the planner: reads the model and data groups on standard input, prints the parameter table as JSON.

The model is built on the meta device, so that 70 billion parameters take as long as 70 thousand.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from anyshard.configs import schema
from anyshard.configs.errors import ConfigError
from anyshard.configs.registry import lookup
from anyshard.parallel.tensor_plan import tensor_plan
from anyshard.trainer.models import param_table


def table_of(model: nn.Module) -> param_table.ParamTable:
    """The table of a module, on any device; dimensions come from its `config` where it has one, else they are 0."""
    names = {id(param): name for name, param in model.named_parameters()}
    everywhere = model.named_parameters(remove_duplicate=False)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    plan = tensor_plan(model)
    splits, summed = plan.splits(), plan.summed()
    return param_table.ParamTable(
        params=tuple(
            param_table.Param(n, tuple(p.shape), p.requires_grad, splits.get(n), n.rpartition(".")[0] in summed)
            for n, p in model.named_parameters()
        ),
        tied=tuple((name, names[id(param)]) for name, param in everywhere if names[id(param)] != name),
        embedding_names=tuple(name for key, name in names.items() if key in embeddings),
        expert_names=tuple(name for name in names.values() if "experts" in name.split(".")),
        split_source=plan.source,
        unsplittable=plan.refused,
        **_dimensions(getattr(model, "config", None)),
    )


def _dimensions(config: Any) -> dict[str, Any]:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config

    def first(*names: str, default: Any = 0) -> Any:
        values = (getattr(text, name, None) for name in names)
        return next((value for value in values if value is not None), default)

    heads, hidden = first("num_attention_heads"), first("hidden_size")
    return {
        "model_type": first("model_type", default="custom"),
        "hidden_size": hidden,
        "num_layers": first("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": first("num_key_value_heads", default=heads),
        "head_dim": first("head_dim", default=hidden // heads if heads else 0),
        "intermediate_size": first("intermediate_size", "n_inner", default=4 * hidden),
        "vocab_size": first("vocab_size"),
        "max_positions": first("max_position_embeddings", default=None),
        "num_experts": first("num_local_experts", "num_experts", "n_routed_experts"),
        "experts_per_token": first("num_experts_per_tok"),
    }


def main() -> int:
    """Answer one request; returns the exit code."""
    model, data = param_table.read_request(sys.stdin.read())
    config = schema.Config(model=model, data=data)
    try:
        build = lookup("model", model.builder, key="model.builder")
        module = build(config, device=torch.device("meta"), dtype=torch.float32, partition=None, say=lambda _: None)
    except ConfigError as error:
        print(param_table.error_answer(error))
        return error.exit_code
    print(table_of(module).to_json())
    return 0


if __name__ == "__main__":
    sys.exit(main())
