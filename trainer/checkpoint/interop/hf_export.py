"""A checkpoint as the folder that `from_pretrained` opens: safetensors, config.json, generation_config.json, tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from anyshard.configs import schema
from anyshard.configs.errors import CheckpointError, ConfigError, Problem
from anyshard.configs.frozen import CONFIG_FILE, load_frozen
from anyshard.trainer.checkpoint import layout
from anyshard.trainer.checkpoint.interop.output import new_folder, reading
from anyshard.trainer.checkpoint.interop.safetensors_file import Entry, shards, write_file
from anyshard.trainer.checkpoint.interop.source import Key, Stored
from anyshard.trainer.checkpoint.manifest import BUFFER, PARAM
from anyshard.trainer.models.hf import build, hf_config

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER = "tokenizer"
"""Folder of a run directory that holds the run's tokenizer as Hugging Face has it."""


def export_hf(
    source: Stored,
    out: Path,
    *,
    run_dir: Path | None = None,
    dtype: str | None,
    max_shard_bytes: int,
    config_file: Path | None,
    report: Callable[[int, int], None],
) -> dict[str, Any]:
    """Write the model of a checkpoint; memory: about one tensor.

    Args:
        run_dir: of the run that saved it, whose tokenizer goes along; None looks around the checkpoint.
        dtype: of the parameters; None: the type that the run trained in.
        max_shard_bytes: largest file, as long as no single tensor is larger.
        config_file: a config.json, for a checkpoint that does not say what model it is of.
        report: called with (bytes written, bytes to write).

    Returns:
        What was written, for people.

    Raises:
        ConfigError: nothing says what model this is, or `out` is occupied.
        CheckpointError: the checkpoint is damaged, or not of that model.
    """
    run_dir = run_dir or _run_dir(source.path)
    described = _description(source, run_dir, config_file)
    with new_folder(out) as folder:
        (folder / "config.json").write_text(json.dumps(described["config"], indent=2) + "\n")
        model = _meta_model(folder, described["config"].get("architectures"))
        dtype = dtype or described.get("dtype") or "float32"
        (folder / "config.json").write_text(json.dumps({**described["config"], "dtype": dtype}, indent=2) + "\n")
        if described.get("generation_config"):
            (folder / "generation_config.json").write_text(json.dumps(described["generation_config"], indent=2) + "\n")
        _check(source, model)
        on_disk = _disk_layout(source, model, dtype)
        files = _write(source, model, folder, on_disk, max_shard_bytes, report)
        notes = _tokenizer(run_dir, folder)
    return {"out": str(out), "step": source.record.step, "dtype": dtype, "files": files, "notes": notes}


def _run_dir(checkpoint: Path) -> Path | None:
    """The run that holds a checkpoint, where it is in its usual place."""
    run = checkpoint.resolve().parent.parent
    return run if checkpoint.resolve().parent.name == "checkpoints" and run.is_dir() else None


def _description(source: Stored, run_dir: Path | None, config_file: Path | None) -> dict[str, Any]:
    """Configuration and type of the model: as asked, as the checkpoint says, or as the run does."""
    if config_file is not None:
        try:
            return {"config": json.loads(config_file.read_text())}
        except (OSError, ValueError) as error:
            raise ConfigError(
                Problem("--config", config_file, f"it cannot be read ({error}).", "Give a config.json.")
            ) from error
    described = source.record.meta.get("model")
    if isinstance(described, dict) and isinstance(described.get("config"), dict):
        return described
    if run_dir is not None and (run_dir / CONFIG_FILE).is_file():
        config = load_frozen(run_dir)
        if config.model.builder == "hf" and (config.model.path or config.model.config.get("model_type")):
            made = hf_config(config.model, config.data)
            description = json.loads(made.to_json_string(use_diff=True))
            description.pop("use_cache", None)
            return {"config": description}
    reason = "the checkpoint does not say that it is of a Hugging Face model."
    raise ConfigError(Problem("SOURCE", source.path, reason, "Give its config.json with --config, or use --to dcp."))


def _meta_model(folder: Path, architectures: Any) -> PreTrainedModel:
    """The model of folder/config.json, without memory; its class must be among `architectures`, where that says anything."""
    config = schema.Config(model=schema.Model(path=str(folder)), data=schema.Data(sequence_length=2))
    try:
        model = build(config, device=torch.device("meta"), dtype=torch.float32)
    except ConfigError as error:
        raise ConfigError(f"The configuration of the model makes no model here: {error}") from error
    if architectures and type(model).__name__ not in architectures:
        reason = f"the model is a {architectures[0]}, and causal language models alone are exported."
        raise ConfigError(Problem("--to", "hf", reason, "Use --to dcp."))
    return model


def _check(source: Stored, model: PreTrainedModel) -> None:
    wanted = layout.global_tensors(model)
    stored = {key: tensor.shape for key, tensor in source.tensors.items() if key[1] in (PARAM, BUFFER)}
    for name, key in [*wanted, *stored]:
        here, there = stored.get((name, key)), wanted.get((name, key))
        if here != there:
            was = f"has shape {here} in the checkpoint and {there} in the model"
            was = "is not in the checkpoint" if here is None else "is not in the model" if there is None else was
            raise CheckpointError(f"{source.path} is not a checkpoint of the {type(model).__name__} configured: {name} {was}.")


def _revert(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors as transformers stores them: experts apart that the model holds together, old names."""
    made: dict[str, torch.Tensor] = revert_weight_conversion(model, tensors)
    return made


def _disk_layout(source: Stored, model: PreTrainedModel, dtype: str) -> list[tuple[Key, str, list[Entry]]]:
    """For each tensor of the checkpoint its name in the model's state dict, and what it becomes in the files."""
    tied_away = set(model.all_tied_weights_keys)
    others: dict[str, list[str]] = {}
    for other, canonical in layout.tied_names(model).items():
        others.setdefault(canonical, []).append(other)
    rows = []
    for name, key in layout.global_tensors(model):
        tensor = source.tensors[name, key]
        names = [name, *others.get(name, ())]
        saved_as = next((each for each in names if each not in tied_away), name)
        floats = tensor.dtype.startswith(("float", "bfloat")) and key == PARAM
        empty = torch.empty(tensor.shape, dtype=getattr(torch, dtype if floats else tensor.dtype), device="meta")
        rows.append(((name, key), saved_as, empty))
    together = {name: tuple(each.shape) for name, each in _revert(model, {name: empty for _, name, empty in rows}).items()}
    found: list[tuple[Key, str, list[Entry]]] = []
    for stored, name, empty in rows:
        made = _revert(model, {name: empty})
        found.append((stored, name, [_entry(each, tensor) for each, tensor in made.items()]))
    if {entry.name: entry.shape for _, _, entries in found for entry in entries} == together:
        return found
    return [(stored, name, [_entry(name, empty)]) for stored, name, empty in rows]  # from_pretrained reads these names as well


def _entry(name: str, tensor: torch.Tensor) -> Entry:
    return Entry(name, layout.dtype_name(tensor.dtype), tuple(tensor.shape))


def _write(
    source: Stored,
    model: PreTrainedModel,
    folder: Path,
    on_disk: list[tuple[Key, str, list[Entry]]],
    max_shard_bytes: int,
    report: Callable[[int, int], None],
) -> list[str]:
    """The safetensors and, where there are several, their index; returns the names of the files."""
    entries = [entry for _, _, made in on_disk for entry in made]
    total, done = sum(entry.nbytes for entry in entries), 0

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for key, name, made in on_disk:
            whole = source.read(key)
            if [entry.name for entry in made] == [name]:
                yield name, whole
            else:
                yield from _revert(model, {name: whole}).items()

    files = shards(entries, max_shard_bytes)
    names = [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    names = [SINGLE] if len(files) == 1 else names
    coming = tensors()
    for name, part in zip(names, files, strict=True):
        for written in write_file(folder / name, part, coming):
            done += written
            report(done, total)
    if len(files) > 1:
        numel = sum(tensor.numel for key, tensor in source.tensors.items() if key[1] == PARAM)
        weight_map = {entry.name: name for name, part in zip(names, files, strict=True) for entry in part}
        index = {"metadata": {"total_parameters": numel, "total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return names


def _tokenizer(run_dir: Path | None, folder: Path) -> list[str]:
    """Copy the run's tokenizer; returns a note where there is none."""
    if run_dir is None or not (run_dir / TOKENIZER).is_dir():
        return ["no tokenizer: the checkpoint is not in a run directory that holds one"]
    with reading(run_dir / TOKENIZER):
        for path in sorted((run_dir / TOKENIZER).iterdir()):
            shutil.copyfile(path, folder / path.name)
    return []
