"""Weights of a checkpoint: safetensors of a directory or of the hub, read one tensor at a time.

The names and fusions on disk are turned into those of the model by transformers' own conversions, so what
`from_pretrained` loads, this loads. Pickle is never read.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.utils.loading_report import LoadStateDictInfo

from anyshard.configs.errors import ConfigError, Problem
from anyshard.trainer.models.fill import Filler, Slot, find_slots

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NAMED = 5  # names shown of a longer list


@dataclass
class Group:
    """Tensors of the checkpoint that together become one or several tensors of the model.

    Attributes:
        target: name of the (first) tensor they become.
        sources: (name in the checkpoint, pattern of the converter that it matched).
        converter: what turns the sources into targets; None where it is only a name.
        targets: names of all tensors they become.
    """

    target: str
    converter: WeightConverter | None
    targets: list[str]
    sources: list[tuple[str, str]] = field(default_factory=list)


def load(filler: Filler, path: str, *, seed: int, say: Callable[[str], None]) -> None:
    """Fill the model from the checkpoint at `path`, then what no checkpoint holds (rotary frequencies) by initialisation.

    Each tensor is read, cast, moved and partitioned before the next is read. A fused tensor (experts of a mixture) is made
    from all its parts: up to three times its size for a moment.

    Raises:
        ConfigError: there are no safetensors, they are damaged, or their tensors are not those of the model.
    Source: transformers 5.23 core_model_loading.py:1606, `convert_and_load_state_dict_in_model`.
    """
    folder = weights_folder(path)
    files = tensor_files(folder, path)
    say(f"loading {len(files)} tensors from {folder}")
    slots = {name: slot for slot in filler.slots for name in slot.names}
    tied: tuple[str, torch.Tensor] | None = None  # the other copy of a tied tensor comes right after the first
    for group in _plan(filler, slots, files, path):
        for name, tensor in _read(group, files, filler, path).items():
            slot = slots[name]
            if tied is not None and tied[0] == slot.name:
                _check_tied(path, slot, tensor, tied[1])
                continue
            _check_shape(path, name, slot, tensor)
            tied = (slot.name, tensor) if len(slot.names) > 1 else None
            slot.put(tensor)
            filler.finish([slot])
    filler.init([slot for slot in filler.slots if slot.tensor.is_meta], seed)


class PretrainedTensors:
    """The tensors of a checkpoint in any order, as they become those of a model on the meta device.

    Args:
        filler: of the model; nothing is filled.
        path: a local folder.

    Raises:
        ConfigError: there are no safetensors, they are damaged, or their tensors are not those of the model.
    """

    def __init__(self, filler: Filler, path: str) -> None:
        self._filler, self._path = filler, path
        self._files = tensor_files(weights_folder(path), path)
        slots = {name: slot for slot in filler.slots for name in slot.names}
        self._groups: dict[str, list[tuple[str, Group]]] = {}
        for group in _plan(filler, slots, self._files, path):
            for target in group.targets:
                self._groups.setdefault(slots[target].name, []).append((target, group))

    def read(self, slot: Slot) -> torch.Tensor:
        """The value of one tensor of the model, on the CPU.

        Raises:
            ConfigError: it is damaged, of another shape, or differs between the names that the model ties.
        """
        found: torch.Tensor | None = None
        for target, group in self._groups[slot.name]:
            fresh = Group(group.target, deepcopy(group.converter), group.targets, group.sources)
            tensor = _read(fresh, self._files, self._filler, self._path)[target]
            if found is not None:
                _check_tied(self._path, slot, tensor, found)
            found = tensor
        assert found is not None
        _check_shape(self._path, slot.name, slot, found)
        return found


def local_path(path: str) -> str:
    """`path` itself, with ~ expanded where it is on this machine.

    Raises:
        ConfigError: it is written like a file name, but there is none.
    """
    local = Path(path).expanduser()
    if local.exists():
        return str(local)
    if path.startswith((".", "/", "~")) or path.endswith(".json") or path.count("/") > 1:
        fix = "Set it to a directory with a config.json, or to a hub id."
        raise ConfigError(Problem("model.path", path, "there is no such file or directory.", fix))
    return path


def weights_folder(path: str) -> Path:
    """The local folder of a checkpoint; a hub id is downloaded, or found in the cache, first.

    Raises:
        ConfigError: the hub has no such model, or cannot be reached.
    """
    local = Path(local_path(path))
    if local.exists():
        return local.parent if local.is_file() else local
    try:
        return Path(snapshot_download(path, allow_patterns=["config.json", SINGLE, INDEX, "*.safetensors"]))
    except (OSError, ValueError) as error:
        reason = f"it is no local directory, and the hub gives none: {' '.join(str(error).split())[:300]}"
        fix = "Set it to a directory, or download the model first with 'hf download'."
        raise ConfigError(Problem("model.path", path, reason, fix)) from error


def tensor_files(folder: Path, path: str) -> dict[str, Path]:
    """The file of every tensor of a checkpoint.

    Raises:
        ConfigError: the folder holds no safetensors, not all of them, or a damaged file.
    """
    if (folder / SINGLE).exists():
        with _damage(path, folder / SINGLE), safe_open(folder / SINGLE, "pt") as file:
            return dict.fromkeys(file.keys(), folder / SINGLE)
    if (folder / INDEX).exists():
        with _damage(path, folder / INDEX):
            names: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
        absent = sorted({name for name in names.values() if not (folder / name).exists()})
        if absent:
            raise ConfigError(
                Problem("model.path", path, f"{_some(absent)} of its {INDEX} is not there.", "Download it again.")
            )
        return {tensor: folder / name for tensor, name in names.items()}
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        reason = "its weights are pickle, which can run any code when it is read; only safetensors are."
        fix = "Convert it once: load it with transformers in a place you can lose, then save_pretrained()."
        raise ConfigError(Problem("model.path", path, reason, fix))
    fix = f"Set it to a directory with {SINGLE} or {INDEX}, or use model.init=random."
    raise ConfigError(Problem("model.path", path, f"{folder} holds no weights.", fix))


def _plan(filler: Filler, slots: dict[str, Slot], files: dict[str, Path], path: str) -> list[Group]:
    """Which tensors of the checkpoint make which of the model, in the model's order; of a pipeline stage, which of its own.

    Args:
        slots: of the model, by name.

    Raises:
        ConfigError: tensors are missing or left over, by the rules of `from_pretrained`.
    """
    model, here = filler.whole, slots
    if model is not filler.model:
        slots = {name: slot for slot in find_slots(model) for name in slot.names}
    expected = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    groups: dict[str, Group] = {}
    unexpected: set[str] = set()
    for key in sorted(files, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, expected)
        if name not in expected and key in expected:
            name, pattern = rename_source_key(key, [], [], model.base_model_prefix, expected)
        if name not in expected or (pattern is None and name in groups):
            unexpected.add(key)
            continue
        converter = by_pattern[pattern] if pattern is not None else None
        targets = (
            [name] if converter is None else [name.replace(converter.target_patterns[0], t) for t in converter.target_patterns]
        )
        group = groups.setdefault(name, Group(name, deepcopy(converter), targets))
        group.sources.append((key, pattern or key))
    found = {id(slots[target]) for group in groups.values() for target in group.targets if target in slots}
    missing = {name for name in expected if id(slots[name]) not in found}
    info = LoadStateDictInfo(missing, unexpected, set(), [], {}, set())
    model._adjust_missing_and_unexpected_keys(info)
    if info.missing_keys:
        raise _misfit(path, f"lacks {_some(sorted(info.missing_keys, key=dot_natural_key))}")
    if info.unexpected_keys:
        raise _misfit(path, f"has {_some(sorted(info.unexpected_keys, key=dot_natural_key))}, which the model has not")
    order = {name: position for position, slot in enumerate(filler.slots) for name in slot.names}
    mine = [group for group in groups.values() if any(target in here for target in group.targets)]
    return sorted(mine, key=lambda group: order.get(group.target, 0))


def _read(group: Group, files: dict[str, Path], filler: Filler, path: str) -> dict[str, torch.Tensor]:
    """The tensors that a group makes, on the CPU, in the type of the model's parameters."""
    if group.converter is None:
        return {group.target: _tensor(files[group.sources[0][0]], group.sources[0][0], filler.dtype, path)}
    for key, pattern in group.sources:
        group.converter.add_tensor(group.target, key, pattern, _tensor(files[key], key, filler.dtype, path))  # type: ignore[arg-type]
    try:
        made = group.converter.convert(group.target, model=filler.model, config=filler.model.config)
    except (RuntimeError, ValueError) as error:
        raise _misfit(path, f"has parts of {group.target} that do not fit together ({error})") from error
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _tensor(file: Path, key: str, dtype: torch.dtype, path: str) -> torch.Tensor:
    """A copy of one tensor; the file is opened anew each time, so that the pages it was mapped to are given back."""
    with _damage(path, file), safe_open(file, "pt") as opened:
        tensor: torch.Tensor = opened.get_tensor(key)
        return tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)


@contextlib.contextmanager
def _damage(path: str, file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise ConfigError(Problem("model.path", path, f"{file} cannot be read ({error}).", "Download it again.")) from error


def _check_shape(path: str, name: str, slot: Slot, tensor: torch.Tensor) -> None:
    if tensor.shape != slot.tensor.shape:
        raise _misfit(path, f"has {name} of shape {tuple(tensor.shape)}, the model of {tuple(slot.tensor.shape)}")


def _check_tied(path: str, slot: Slot, tensor: torch.Tensor, other: torch.Tensor) -> None:
    if not torch.equal(tensor, other):
        reason = f"the checkpoint has different values for {' and '.join(slot.names)}, which the model ties."
        raise ConfigError(Problem("model.path", path, reason, "Set model.config.tie_word_embeddings=false."))


def _misfit(path: str, what: str) -> ConfigError:
    fix = "Set model.path to a checkpoint of this architecture, leave model.config out, or use model.init=random."
    return ConfigError(Problem("model.path", path, f"the checkpoint {what}.", fix))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
