"""Tensor parallelism: DeepSpeed's AutoTP layers in training mode, in the places and cuts of a `TensorPlan`.

AutoTP's own entry (`tensor_parallel` in the configuration of `deepspeed.initialize`) wants the whole model on every rank and
does not know fused projections of Conv1D. Here a parameter is cut as soon as it has its values (`Sharder.place`), so that a
rank never holds more of the model than its share and one module, and the layers are put in afterwards (`Sharder.finish`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.module_inject.layers import (
    DS_TENSOR_MODEL_PARALLEL,
    ColumnParallel,
    GatherFromTensorParallelRegion,
    LinearAllreduce,
    LinearLayer,
    RowParallel,
    VocabParallelEmbedding,
    set_autotp_mode,
)
from torch import nn

from anyshard.parallel.groups import Groups
from anyshard.parallel.part import Part, mark_part, part_of
from anyshard.parallel.split import Split
from anyshard.parallel.tensor_plan import Layer, TensorPlan, require, tensor_plan


class _Cut:
    """What our subclasses of DeepSpeed's layers have in common: their parameters are cut already, by a plan of ours."""

    _sizes: tuple[int, ...]

    def _freeze_partition_sizes(self, total_size: int) -> tuple[int, ...]:
        self._partition_sizes = self._sizes
        return self._sizes

    def _should_materialize_tp_partition(self) -> bool:
        return False

    def _mark_uc_metadata(self) -> None:
        """For DeepSpeed's universal checkpoints, which are not used."""


class _Entry:
    """Lets layers that read the same input enter the split region together: its gradients are summed over the ranks once.

    DeepSpeed's layers enter one by one, which takes an all-reduce for each of q, k and v where Megatron-LM has one for all.
    """

    def __init__(self) -> None:
        self.num_layers = 0
        self._left = 0
        self._input: torch.Tensor | None = None
        self._entered: torch.Tensor | None = None

    def __call__(self, group: dist.ProcessGroup, input: torch.Tensor) -> torch.Tensor:
        if self._entered is None or self._input is not input:
            self._input, self._entered, self._left = input, ColumnParallel.apply(group, input), self.num_layers
        entered: torch.Tensor = self._entered
        self._left -= 1
        if self._left <= 0:  # the last of them: nothing is kept beyond it
            self._input = self._entered = None
        return entered


class ColumnLinear(_Cut, LinearLayer):  # type: ignore[misc]
    """A linear layer of which this rank computes some of the outputs; all of them where they are gathered.

    `F.linear` rather than DeepSpeed's `matmul`: under ZeRO-3 it is replaced by one that does not keep the gathered weight.
    """

    def __init__(self, module: nn.Module, group: dist.ProcessGroup, sizes: list[int], layer: Layer) -> None:
        self._sizes = tuple(sizes)
        self.transposed = layer.transposed
        super().__init__(module, group, skip_partition=True, gather_output=layer.style == "gather")
        self.share(_Entry())

    def share(self, entry: _Entry) -> None:
        """Enter the split region with the other layers that were given the same entry."""
        self._entry = entry
        entry.num_layers += 1

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Shape: [..., in] -> [..., out of this rank, or all]."""
        output = _linear(self._entry(self.mp_group, input), self.weight, self.bias, self.transposed)
        if self.gather_output:
            output = GatherFromTensorParallelRegion.apply(self.mp_group, output, self._partition_sizes)
        return output


class RowLinear(_Cut, LinearAllreduce):  # type: ignore[misc]
    """A linear layer of which this rank has some of the inputs; outputs are summed over the ranks."""

    def __init__(self, module: nn.Module, group: dist.ProcessGroup, sizes: list[int], layer: Layer) -> None:
        self._sizes = tuple(sizes)
        self.transposed = layer.transposed
        super().__init__(module, group)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Shape: [..., in of this rank] -> [..., out]."""
        partial = _linear(input, self.weight, None, self.transposed)
        output: torch.Tensor = RowParallel.apply(self.mp_group, partial, False)
        return output if self.bias is None else output + self.bias


class VocabularyEmbedding(_Cut, VocabParallelEmbedding):  # type: ignore[misc]
    """An embedding of which this rank holds the rows of some tokens."""

    def __init__(self, module: nn.Embedding, group: dist.ProcessGroup, sizes: list[int]) -> None:
        self._sizes = tuple(sizes)
        super().__init__(module, group)

    @staticmethod
    def validate_embedding(module: nn.Module) -> None:
        """The plan has looked: `tensor_plan._is_plain_embedding`."""


class FusedColumnLinear(nn.Module):
    """Several projections of one input that the model keeps as one: each is cut by itself, and is a parameter of its own."""

    def __init__(
        self, group: dist.ProcessGroup, weights: list[nn.Parameter], biases: list[nn.Parameter], *, transposed: bool
    ) -> None:
        super().__init__()
        self.mp_group, self.transposed = group, transposed
        self.weights, self.biases = [f"weight_{n}" for n in range(len(weights))], [f"bias_{n}" for n in range(len(biases))]
        for name, param in zip([*self.weights, *self.biases], [*weights, *biases], strict=True):
            setattr(self, name, param)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Shape: [..., in] -> [..., this rank's part of the first, of the second, ...]."""
        input = ColumnParallel.apply(self.mp_group, input)
        weights = [getattr(self, name) for name in self.weights]
        biases = [getattr(self, name) for name in self.biases] or [None] * len(weights)
        return torch.cat([_linear(input, w, b, self.transposed) for w, b in zip(weights, biases, strict=True)], dim=-1)


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool) -> torch.Tensor:
    if not transposed:
        return F.linear(input, weight, bias)
    output = torch.matmul(input, weight)
    return output if bias is None else output + bias


class Sharder:
    """Splits one model over the ranks of `groups.tp`.

    Args:
        model: on the meta device or not; its parameters are still whole.
        model_name: for errors.

    Raises:
        ConfigError: the model cannot be split into so many parts.
    """

    def __init__(self, model: nn.Module, groups: Groups, model_name: str) -> None:
        self._model, self._groups = model, groups
        self.plan: TensorPlan = tensor_plan(model)
        require(self.plan, groups.mesh.tp, model_name)
        self._splits = self.plan.splits()
        self._parts: dict[str, list[nn.Parameter]] = {}  # parameters that became several

    def place(self, names: list[str], param: nn.Parameter) -> list[nn.Parameter]:
        """Cut a whole parameter, in place; returns the parameters that it became (one, unless it is fused).

        Args:
            names: every name that it has in the model.
        """
        split = next((self._splits[name] for name in names if name in self._splits), None)
        if split is None:
            return [param]
        pieces = self._pieces(names[0], param, split)
        if len(pieces) == 1:
            (param.data, part) = pieces[0]
            mark_part(param, part)
            return [param]
        params = []
        for data, part in pieces:
            params.append(nn.Parameter(data, requires_grad=param.requires_grad))
            mark_part(params[-1], part)
        self._parts[names[0]] = params
        param.data = param.data.new_empty(0)
        return params

    def _pieces(self, name: str, param: nn.Parameter, split: Split) -> list[tuple[torch.Tensor, Part]]:
        shape, tp, rank = tuple(param.shape), self._groups.mesh.tp, self._groups.tp_rank
        boxes = split.boxes(shape, tp, rank)
        holders = [block.holders(tp, rank) for block in split.blocks]
        cut = [param.data[tuple(slice(start, stop) for start, stop in box)].clone() for box in boxes]
        return [(data, Part(name, shape, box, held)) for data, box, held in zip(cut, boxes, holders, strict=True)]

    def restrict(self) -> None:
        """Forget the layers that the model has no longer: other stages of a pipeline have them."""
        held = {name.rpartition(".")[0] for name, _ in self._model.named_parameters(remove_duplicate=False)}
        modules = dict(self._model.named_modules())
        self.plan.layers = {name: layer for name, layer in self.plan.layers.items() if name in held}
        self.plan.divide = {name: counted for name, counted in self.plan.divide.items() if name in modules}

    def finish(self) -> None:
        """Put in the layers that compute with the parts. Every parameter must have been placed."""
        set_autotp_mode(training=True)
        entries: dict[str, _Entry] = {}  # by the module that they belong to: its layers mostly read the same
        for name, layer in self.plan.layers.items():
            parent, _, attribute = name.rpartition(".")
            owner = self._model.get_submodule(parent)
            made = self._replacement(name, owner.get_submodule(attribute), layer)
            setattr(owner, attribute, made)
            if isinstance(made, ColumnLinear):
                made.share(entries.setdefault(parent, _Entry()))
        self._divide()
        for param in self._model.parameters():
            self._declare(param)

    def _replacement(self, name: str, module: Any, layer: Layer) -> Any:
        group = self._groups.tp
        assert group is not None
        if layer.style == "sum":
            for param in module.parameters():
                _sum_gradients(param, group)
            return module
        weights = self._parts.get(f"{name}.weight")
        if weights is not None:
            biases = self._parts.get(f"{name}.bias", [])
            return FusedColumnLinear(group, weights, biases, transposed=layer.transposed)
        weight = layer.split_of("weight")
        assert weight is not None
        sizes = weight.sizes(self._groups.mesh.tp)
        if layer.style == "vocabulary":
            return VocabularyEmbedding(module, group, sizes)
        if layer.style == "row":
            return RowLinear(module, group, sizes, layer)
        return ColumnLinear(module, group, sizes, layer)

    def _divide(self) -> None:
        """Have modules that count heads or features count those of this rank."""
        for name, counted in self.plan.divide.items():
            module = self._model.get_submodule(name)
            for attribute, what in counted.items():
                setattr(module, attribute, self._queries(name, what))
        for name, module in self._model.named_modules():
            if isinstance(getattr(module, "num_key_value_groups", None), int):
                queries, keys = self._local(f"{name}.q_proj.weight"), self._local(f"{name}.k_proj.weight")
                if queries and keys:
                    module.num_key_value_groups = queries // keys

    def _queries(self, name: str, what: str) -> int:
        """What this rank has of the queries of an attention module, in heads or in features."""
        (row,) = [layer for path, layer in self.plan.layers.items() if path.startswith(f"{name}.") and layer.style == "row"]
        start, stop = row.blocks[0].interval(self._groups.mesh.tp, self._groups.tp_rank)
        return stop - start if what == "features" else (stop - start) // (row.blocks[0].fine or 1)

    def _local(self, name: str) -> int:
        split = self._splits.get(name)
        return 0 if split is None else split.sizes(self._groups.mesh.tp)[self._groups.tp_rank]

    def _declare(self, param: nn.Parameter) -> None:
        """Tell DeepSpeed's gradient norms what to count: what only this rank holds, and on rank 0 what all hold.

        Of several ranks that hold the same part the first counts it, and its gradient is the sum of theirs.
        """
        part = part_of(param)
        if part is None:
            return
        first = part.holders[0] == self._groups.tp_rank
        setattr(param, DS_TENSOR_MODEL_PARALLEL, first)
        if len(part.holders) > 1:
            _sum_gradients(param, self._groups.subgroup(part.holders))

    def shard_all(self) -> None:
        """Split a model whose parameters all have their values."""
        seen: dict[int, tuple[nn.Parameter, list[str]]] = {}
        for name, param in self._model.named_parameters(remove_duplicate=False):
            seen.setdefault(id(param), (param, []))[1].append(name)
        for param, names in seen.values():
            self.place(names, param)
        self.finish()


def _sum_gradients(param: nn.Parameter, group: dist.ProcessGroup) -> None:
    """Sum the gradient of a parameter over a group before it is accumulated."""

    def hook(grad: torch.Tensor) -> torch.Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=group)
        return grad

    if param.requires_grad:
        param.register_hook(hook)  # type: ignore[no-untyped-call]


def is_embedding(module: nn.Module) -> bool:
    """Whether a module looks its weight up instead of multiplying with it."""
    return isinstance(module, nn.Embedding | VocabParallelEmbedding)


def counted_squares(params: Any, groups: Groups) -> torch.Tensor:
    """Sum of squares of all gradients of the global model, each counted once.

    Collective: the ranks of `groups.tp` call it; it blocks.
    """
    first = groups.tp_rank == 0
    counted = [param for param in params if first or getattr(param, DS_TENSOR_MODEL_PARALLEL, False)]
    total = nn.utils.get_total_norm([param.grad for param in counted if param.grad is not None]) ** 2
    dist.all_reduce(total, group=groups.tp)
    return total
