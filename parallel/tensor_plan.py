"""Which layers of a Hugging Face model tensor parallelism splits, and how: from a YAML plan, the model's own, or rules.

In that order: `plans/<model_type>.yaml` where there is one, `tp_plan` of the model (transformers has one for most
architectures), else rules on names and shapes. Nothing is split here; `tensor.py` does that.

Source: transformers 5.23 integrations/tensor_parallel.py for the styles of a `tp_plan`.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from torch import nn
from transformers.pytorch_utils import Conv1D

from anyshard.configs.errors import ConfigError, Problem
from anyshard.parallel.split import Block, Split, split_problems

STYLES = {
    "colwise": "column",
    "colwise_gather_output": "gather",
    "colwise_rep": "gather",
    "rowwise": "row",
    "embedding_rowwise": "vocabulary",
    "replicated_with_grad_allreduce": "sum",
}
"""Style of a transformers plan -> ours."""

_ATTENTION = re.compile(r"(^|\.)(self_)?att(n|ention)(\.|$)")
_KEYS = ("k_proj", "v_proj", "key", "value")
_COLUMN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "fc1", "fc_in", "c_fc", "w1", "w3", "dense_h_to_4h")
_ROW = ("o_proj", "out_proj", "down_proj", "fc2", "fc_out", "w2", "dense_4h_to_h")
PLANS = Path(__file__).parent / "plans"


@dataclass(frozen=True)
class Layer:
    """How one module is split.

    Attributes:
        style: "column" (outputs), "row" (inputs), "gather" (outputs, put together again: a head), "vocabulary" (rows of an
            embedding), "sum" (whole, but it sees a part of the activations, so that its gradients must be summed).
        blocks: of the dim that is cut; empty for "sum".
        transposed: the weight is [in, out].
    """

    style: str
    blocks: tuple[Block, ...] = ()
    transposed: bool = False

    def split_of(self, attribute: str) -> Split | None:
        """How the layer's parameter of this name ("weight", "bias") is cut; None for one that every rank holds."""
        if self.style == "sum":
            return None
        if attribute == "bias":
            return Split(0, self.blocks) if self.style in ("column", "gather") else None
        outputs = self.style != "row"
        return Split(0 if outputs != self.transposed else 1, self.blocks)


@dataclass
class TensorPlan:
    """The split of a whole model.

    Attributes:
        layers: by module name.
        divide: module name -> attribute -> "heads" or "features": what it counts, of the queries.
        source: where the plan is from, for people.
        refused: why the model cannot be split; None when it can.
    """

    source: str
    layers: dict[str, Layer] = field(default_factory=dict)
    divide: dict[str, dict[str, str]] = field(default_factory=dict)
    refused: str | None = None

    def splits(self) -> dict[str, Split]:
        """Parameter name -> how it is cut, of all that are."""
        found = {}
        for name, layer in self.layers.items():
            for attribute in ("weight", "bias"):
                split = layer.split_of(attribute)
                if split is not None:
                    found[f"{name}.{attribute}"] = split
        return found

    def summed(self) -> list[str]:
        """Names of the modules whose gradients are summed over the ranks."""
        return [name for name, layer in self.layers.items() if layer.style == "sum"]


@dataclass(frozen=True)
class _Heads:
    """Dimensions of attention."""

    heads: int
    kv_heads: int
    head_dim: int

    @property
    def queries(self) -> Block:
        return Block(self.heads * self.head_dim, self.heads // self.kv_heads * self.head_dim, fine=self.head_dim)

    @property
    def keys(self) -> Block:
        return Block(self.kv_heads * self.head_dim, self.head_dim, shared=True)


def tensor_plan(model: Any) -> TensorPlan:
    """The plan of a model, on any device (the meta device will do)."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_input_embeddings"):
        return TensorPlan("none", refused="only Hugging Face models can be split.")
    text = config.get_text_config()
    heads = _heads(text)
    if heads is None:
        return TensorPlan("none", refused="its configuration does not say how many attention heads it has.")
    file = PLANS / f"{text.model_type}.yaml"
    if file.exists():
        plan = _from_yaml(model, file, heads)
    elif getattr(model, "tp_plan", None):
        plan = _from_model(model, model.tp_plan, heads)
    else:
        plan = _from_rules(model, heads)
    if plan.refused is None:
        _split_vocabulary(model, plan)
        plan.refused = _unbalanced(plan)
    return plan


def _heads(text: Any) -> _Heads | None:
    heads = getattr(text, "num_attention_heads", None)
    hidden = getattr(text, "hidden_size", None)
    if not isinstance(heads, int) or not isinstance(hidden, int):
        return None
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or hidden // heads
    return _Heads(heads, kv_heads, head_dim) if heads % kv_heads == 0 else None


def _from_yaml(model: nn.Module, file: Path, heads: _Heads) -> TensorPlan:
    text = yaml.safe_load(file.read_text())
    plan = TensorPlan(f"parallel/plans/{file.name}")
    for name, module in model.named_modules():
        for pattern, entry in text["layers"].items():
            if fnmatch.fnmatchcase(name, pattern):
                blocks = tuple(getattr(heads, block) for block in entry.get("blocks", ()))
                layer = Layer(entry["style"], blocks, isinstance(module, Conv1D))
                plan.layers[name] = layer if blocks else Layer(layer.style, _even(module, layer), layer.transposed)
        for pattern, counted in text.get("divide", {}).items():
            if fnmatch.fnmatchcase(name, pattern):
                plan.divide[name] = dict(counted)
    return plan


def _from_model(model: Any, styles: dict[str, str], heads: _Heads) -> TensorPlan:
    plan = TensorPlan("the model's tp_plan")
    embeddings = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    for name, module in model.named_modules():
        style = styles.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))
        if style is None or id(module) in embeddings or "experts" in name.split("."):
            continue  # experts stay whole: every rank computes all of them
        if style not in STYLES:
            plan.refused = f"its tp_plan wants {style!r} for {name}, which is not supported."
            return plan
        plan.layers[name] = _layer(name, module, STYLES[style], heads)
    return plan


def _from_rules(model: nn.Module, heads: _Heads) -> TensorPlan:
    """Two rules: what a block begins with is cut by outputs, what it ends with by inputs."""
    plan = TensorPlan("rules on names and shapes")
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if not isinstance(module, nn.Linear | Conv1D) or not re.search(r"\.\d+\.", name) or "experts" in name.split("."):
            continue
        if last in _COLUMN or last in _ROW:
            plan.layers[name] = _layer(name, module, "column" if last in _COLUMN else "row", heads)
            around = name.rpartition(".")[0]
            if _ATTENTION.search(around):
                counts = {"num_heads": "heads", "num_attention_heads": "heads"}
                owner = model.get_submodule(around)
                plan.divide[around] = {key: what for key, what in counts.items() if getattr(owner, key, None) == heads.heads}
    if not plan.layers:
        plan.refused = f"no rule knows the layers of {type(model).__name__}, and there is no plan for it."
    return plan


def _layer(name: str, module: nn.Module, style: str, heads: _Heads) -> Layer:
    transposed = isinstance(module, Conv1D)
    if style == "sum":
        return Layer(style)
    if not _ATTENTION.search(name):
        bare = Layer(style, (), transposed)
        return Layer(style, _even(module, bare), transposed)
    size = _size(module, Layer(style, (), transposed))
    last = name.rpartition(".")[2]
    if style == "column" and last in _KEYS:
        block = heads.keys
    elif size == heads.queries.size:
        block = heads.queries
    else:  # queries, keys and values of a head follow each other
        block = Block(size, size // heads.kv_heads)
    return Layer(style, (block,), transposed)


def _even(module: nn.Module, layer: Layer) -> tuple[Block, ...]:
    return (Block(_size(module, layer)),)


def _size(module: Any, layer: Layer) -> int:
    """Elements of the dim of the weight that is cut."""
    outputs = layer.style != "row"
    shape = tuple(getattr(module.weight, "ds_shape", module.weight.shape))
    return int(shape[0 if outputs != layer.transposed else 1])


def _split_vocabulary(model: Any, plan: TensorPlan) -> None:
    """Cut the embedding of tokens and the head by tokens; both stay whole where they are one and one cannot be cut."""
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and embedding is not None and head.weight is embedding.weight
    cut_embedding = embedding is not None and _is_plain_embedding(embedding)
    if tied and not (cut_embedding and isinstance(head, nn.Linear)):
        return
    if cut_embedding:
        plan.layers[names[id(embedding)]] = Layer("vocabulary", (Block(embedding.weight.shape[0]),))
    if isinstance(head, nn.Linear):
        plan.layers[names[id(head)]] = Layer("gather", (Block(head.weight.shape[0]),))


def _is_plain_embedding(embedding: Any) -> bool:
    """Whether DeepSpeed's vocabulary-parallel embedding does what this one does: look up, and scale as Gemma does.

    Source: deepspeed 0.19.8 module_inject/layers.py:1110, `VocabParallelEmbedding.validate_embedding`, which names Gemma 3's
    alone; transformers 5.23 has the same class for Gemma and Gemma 2.
    """
    if not isinstance(embedding, nn.Embedding) or embedding.max_norm is not None:
        return False
    if embedding.scale_grad_by_freq or embedding.sparse:
        return False
    scaled = re.fullmatch(r"Gemma\d*TextScaledWordEmbedding", type(embedding).__name__)
    return type(embedding).forward is nn.Embedding.forward or scaled is not None


def _unbalanced(plan: TensorPlan) -> str | None:
    """Why a plan cannot be right: columns without rows leave a part of the activations where the whole is expected."""
    parents: dict[str, set[str]] = {}
    for name, layer in plan.layers.items():
        if layer.style in ("column", "row"):
            parents.setdefault(name.rpartition(".")[0], set()).add(layer.style)
    for parent, styles in parents.items():
        if styles != {"column", "row"}:
            return f"{parent} would be split by {styles.pop()} only."
    return None


def problems(plan: TensorPlan, tp: int, model_name: str) -> Iterator[Problem]:
    """Why a model cannot be split into `tp`."""
    yield from split_problems(plan.refused, list(plan.splits().items()), tp, model_name)


def require(plan: TensorPlan, tp: int, model_name: str) -> None:
    """Refuse a degree that the model cannot be split into.

    Raises:
        ConfigError: it cannot.
    """
    found = list(problems(plan, tp, model_name))
    if found:
        raise ConfigError(found)
