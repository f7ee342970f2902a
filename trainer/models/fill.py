"""Give a model that was built on the meta device its memory and values, one module at a time.

Used by `hf.py` alone. `Filler` knows every tensor of the model once (a tied parameter has several places, all are given
the same object), makes it, hands it to the ZeRO-3 partitioner and forgets the full copy before the next one is made.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import xxhash
from torch import nn
from transformers import PreTrainedModel, initialization

from anyshard.configs.errors import ConfigError, Problem

Partition = Callable[[list[nn.Parameter]], None]
Place = Callable[[list[str], nn.Parameter], list[nn.Parameter]]


@dataclass
class Slot:
    """One parameter or buffer of the model and every place that holds it.

    Attributes:
        name: its canonical name, that of its first place.
        places: (module, attribute) pairs; the first one initialises it.
        names: its name at each place.
    """

    name: str
    tensor: torch.Tensor
    places: list[tuple[nn.Module, str]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    @property
    def is_parameter(self) -> bool:
        """Whether it is a parameter rather than a buffer."""
        return isinstance(self.tensor, nn.Parameter)

    def put(self, tensor: torch.Tensor) -> None:
        """Set `tensor` at every place."""
        self.tensor = nn.Parameter(tensor, requires_grad=self.tensor.requires_grad) if self.is_parameter else tensor
        for module, attribute in self.places:
            (module._parameters if self.is_parameter else module._buffers)[attribute] = self.tensor  # type: ignore[assignment]


class Filler:
    """Fills the tensors of one model on the meta device.

    Args:
        dtype: type of the parameters; buffers keep theirs.
        place: called with the names and the parameter as soon as it has its values; cuts it (tensor parallelism) and returns
            what it became.
        partition: called with the new parameters of a module after that (ZeRO-3).
        whole: the model of which `model` is a pipeline stage, on the meta device; None where it is whole itself.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        device: torch.device,
        dtype: torch.dtype,
        partition: Partition | None,
        place: Place | None = None,
        whole: PreTrainedModel | None = None,
    ) -> None:
        self.model = model
        self.whole = model if whole is None else whole
        self.device, self.dtype, self.partition, self.place = device, dtype, partition, place
        self.slots = find_slots(model)
        self._lines = {id(module): line for module, line in _lines(model)}

    def finish(self, slots: list[Slot]) -> None:
        """Move filled tensors to the device, parameters in `dtype`, and let them be partitioned."""
        for slot in slots:
            dtype = self.dtype if slot.is_parameter and slot.tensor.is_floating_point() else slot.tensor.dtype
            slot.tensor.data = slot.tensor.data.to(self.device, dtype)
        params: list[nn.Parameter] = []
        for slot in slots:
            if isinstance(slot.tensor, nn.Parameter):
                params += [slot.tensor] if self.place is None else self.place(slot.names, slot.tensor)
        if self.partition is not None and params:
            self.partition(params)

    @torch.no_grad()
    def init(self, slots: list[Slot], seed: int) -> None:
        """Initialise these tensors as the model itself does, from the seed and their names alone.

        Each tensor is made in float32 on the CPU, whatever the device: a generator of the GPU gives other numbers. A CPU core
        makes about 2e8 of them a second, 40 s for 8 billion parameters on every rank.

        `_init_weights` runs on the module that holds the tensor and then on those around it, as in
        `PreTrainedModel.initialize_weights`: GPT-2's attention rescales the projection inside it.

        Raises:
            ConfigError: the model's code leaves a tensor without value.
        Source: transformers 5.23 modeling_utils.py:2388 (`initialize_weights`), initialization.py:52 (`_is_hf_initialized`).
        """
        with _guarded(self.slots), initialization.guard_torch_init_functions(), torch.random.fork_rng(devices=[]):
            for module_slots in _by_module(slots):
                for slot in module_slots:
                    slot.put(torch.empty(slot.tensor.shape, dtype=_init_dtype(slot.tensor), device="cpu"))
                    slot.tensor._is_hf_initialized = True  # type: ignore[attr-defined]
                for slot in module_slots:
                    self._init_one(slot, seed)
                self.finish(module_slots)

    def _init_one(self, slot: Slot, seed: int) -> None:
        tensor = slot.tensor
        values = []
        fills = (float("nan"),) if tensor.is_floating_point() else (0, 1)  # integers cannot say that nothing wrote them
        for value in fills:
            tensor.fill_(value)
            torch.default_generator.manual_seed(xxhash.xxh64_intdigest(f"{seed}:{slot.name}".encode()))
            del tensor._is_hf_initialized  # type: ignore[attr-defined]
            for owner, module in self._lines[id(slot.places[0][0])]:
                owner._init_weights(module)  # type: ignore[no-untyped-call]
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]
            values.append(tensor.sum())
        if not torch.equal(values[0], values[-1]):  # a NaN is not equal to itself
            raise ConfigError(
                Problem(
                    "model.init",
                    "random",
                    f"the code of {type(self.model).__name__} gives {slot.name} no initial value.",
                    "Use model.init=pretrained, or register a builder of your own (model.builder).",
                )
            )


def _init_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float32 if isinstance(tensor, nn.Parameter) and tensor.is_floating_point() else tensor.dtype


def find_slots(model: PreTrainedModel) -> list[Slot]:
    """Every parameter and buffer of a model once."""
    tied_away = set(model.all_tied_weights_keys)
    slots: dict[int, Slot] = {}
    for prefix, module in model.named_modules():
        for attribute, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None:
                continue
            name = f"{prefix}.{attribute}" if prefix else attribute
            slot = slots.setdefault(id(tensor), Slot(name, tensor))
            at = 0 if slot.names and slot.names[0] in tied_away and name not in tied_away else len(slot.names)
            slot.places.insert(at, (module, attribute))
            slot.names.insert(at, name)
    return list(slots.values())


def _by_module(slots: list[Slot]) -> Iterator[list[Slot]]:
    modules: dict[int, list[Slot]] = {}
    for slot in slots:
        modules.setdefault(id(slot.places[0][0]), []).append(slot)
    yield from modules.values()


def _lines(model: PreTrainedModel) -> Iterator[tuple[nn.Module, list[tuple[PreTrainedModel, nn.Module]]]]:
    """Each module with the calls that initialise it: (model that knows how, module), innermost first.

    Source: transformers 5.23 modeling_utils.py:2399, `smart_apply`; :2373, remote code touches only its own tensors.
    """

    def visit(
        module: nn.Module, owner: PreTrainedModel, outer: list[tuple[PreTrainedModel, nn.Module]]
    ) -> Iterator[tuple[nn.Module, list[tuple[PreTrainedModel, nn.Module]]]]:
        line = [(owner, module), *outer]
        yield module, line
        for child in module.children():
            child_owner = child if isinstance(child, PreTrainedModel) else owner
            yield from visit(child, child_owner, [] if model.is_custom_code() else line)

    yield from visit(model, model, [])


@contextlib.contextmanager
def _guarded(slots: list[Slot]) -> Iterator[None]:
    """Mark every tensor as initialised, so that `_init_weights` leaves alone all but the one whose mark is taken off."""
    for slot in slots:
        slot.tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for slot in slots:
            if hasattr(slot.tensor, "_is_hf_initialized"):
                del slot.tensor._is_hf_initialized
