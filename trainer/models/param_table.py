"""The parameters of a model by name and shape, for the planner; nothing here imports torch.

`launch` gets a table from a child process: it writes `request(...)` to the standard input of
`python -m anyshard.trainer.models.table` and gives what that prints to `read_answer`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

from anyshard.configs import schema
from anyshard.configs.errors import ConfigError, Problem
from anyshard.configs.keys import plain
from anyshard.parallel.split import Block, Split

TABLE_FORMAT = 2
"""Counted up when the table changes: tables are cached."""


@dataclass(frozen=True)
class Param:
    """One parameter: its canonical name and global shape.

    Attributes:
        split: how tensor parallelism cuts it; None: every rank holds all of it.
        summed: tensor-parallel ranks see a part of the activations with it, so that its gradients are summed.
    """

    name: str
    shape: tuple[int, ...]
    trainable: bool = True
    split: Split | None = None
    summed: bool = False

    def local_numel(self, tp: int) -> int:
        """Elements on the tensor-parallel rank that holds most of it."""
        if tp == 1 or self.split is None:
            return self.numel
        return self.numel // self.shape[self.split.dim] * max(self.split.sizes(tp))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ParamTable:
    """Every parameter of a model once, and the dimensions that memory and FLOPs depend on; free of types.

    Attributes:
        params: in the order of the model's modules; a tied parameter under its first name.
        tied: pairs (other name, name in `params`).
        embedding_names: parameters that are looked up rather than multiplied (token and position embeddings).
        expert_names: parameters of routed experts, of which `experts_per_token / num_experts` are active for a token.
        num_experts: 0 where the model has no routed experts.
        max_positions: longest sequence; None where the model sets no bound.
        split_source: where the splits are from.
        unsplittable: why tensor parallelism cannot split the model; None where it can.
    """

    params: tuple[Param, ...]
    tied: tuple[tuple[str, str], ...]
    embedding_names: tuple[str, ...]
    expert_names: tuple[str, ...]
    model_type: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_positions: int | None
    num_experts: int
    experts_per_token: int
    split_source: str = "none"
    unsplittable: str | None = None

    @property
    def num_params(self) -> int:
        """Elements of all parameters, each tied one once."""
        return sum(param.numel for param in self.params)

    @property
    def num_trainable(self) -> int:
        """Elements of the parameters that are trained."""
        return sum(param.numel for param in self.params if param.trainable)

    @property
    def num_embedding_params(self) -> int:
        """Elements of the embeddings."""
        names = set(self.embedding_names)
        return sum(param.numel for param in self.params if param.name in names)

    @property
    def num_expert_params(self) -> int:
        """Elements of all routed experts."""
        names = set(self.expert_names)
        return sum(param.numel for param in self.params if param.name in names)

    def modules(self) -> dict[str, int]:
        """Elements of the parameters that each module holds itself, by module name; the largest bounds building."""
        sizes: dict[str, int] = {}
        for param in self.params:
            module = param.name.rpartition(".")[0]
            sizes[module] = sizes.get(module, 0) + param.numel
        return sizes

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ParamTable:
        """The table that `to_json` wrote."""
        raw: dict[str, Any] = json.loads(text)
        raw["params"] = tuple(_param(param) for param in raw["params"])
        raw["tied"] = tuple((other, name) for other, name in raw["tied"])
        raw["embedding_names"], raw["expert_names"] = tuple(raw["embedding_names"]), tuple(raw["expert_names"])
        return cls(**raw)


def _param(raw: dict[str, Any]) -> Param:
    split = raw["split"] and Split(raw["split"]["dim"], tuple(Block(**block) for block in raw["split"]["blocks"]))
    return Param(raw["name"], tuple(raw["shape"]), raw["trainable"], split, raw["summed"])


def request(model: schema.Model, data: schema.Data) -> str:
    """What the child process reads: the two groups as JSON, enums by value."""
    return json.dumps({"model": plain(model), "data": plain(data)})


def read_request(text: str) -> tuple[schema.Model, schema.Data]:
    """The groups that `request` wrote."""
    raw = json.loads(text)
    return _group(schema.Model, raw["model"]), _group(schema.Data, raw["data"])


def _group(cls: type[Any], values: dict[str, Any]) -> Any:
    enums = {field.name: type(field.default) for field in dataclasses.fields(cls) if isinstance(field.default, Enum)}
    return cls(**{name: enums[name](value) if name in enums else value for name, value in values.items()})


def error_answer(error: ConfigError) -> str:
    """What the child process prints for a configuration that makes no model."""
    return json.dumps({"message": str(error), "problems": [dataclasses.asdict(p) for p in error.problems]}, default=str)


def read_answer(text: str) -> ParamTable:
    """The table that the child process printed.

    Raises:
        ConfigError: the configuration makes no model; the same problems as the child found.
    """
    raw = json.loads(text)
    if "message" in raw:
        raise ConfigError([Problem(**problem) for problem in raw["problems"]] or raw["message"])
    return ParamTable.from_json(text)
