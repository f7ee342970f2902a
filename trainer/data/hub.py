"""Source `hf`: Hugging Face datasets, from a folder of theirs, from data files, or from the hub."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

from anyshard.configs import schema
from anyshard.configs.errors import DataError, EnvError, Problem
from anyshard.trainer.data.cache import fingerprint
from anyshard.trainer.data.documents import Document, Documents, held_out
from anyshard.trainer.data.files import check_local

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text", ".arrow": "arrow"}
_ROWS_AT_ONCE = 256


def hf(data: schema.Data, seed: int) -> Documents:
    """Rows of a Hugging Face dataset: a save_to_disk folder, data files, or a hub id; streamed if data.streaming.

    Raises:
        DataError: no such dataset or split, or rows without the text field.
        EnvError: the `datasets` library is not installed.
    """
    datasets = _library()
    if data.path is None:
        raise DataError(Problem("data.path", None, "source hf needs it.", "Set it to a datasets folder or a hub id."))
    train = _open(datasets, data, "data.path", data.path, data.hf_split)
    validation = _open_validation(datasets, data)
    _check_field(data, train)

    def rows(key: str, dataset: Any) -> Iterator[str]:
        done = 0
        for batch in dataset.select_columns([data.field]).iter(batch_size=_ROWS_AT_ONCE):
            for number, content in enumerate(batch[data.field], start=done):
                if not isinstance(content, str):
                    reason = f"row {number} of {key} holds {type(content).__name__}, not text."
                    raise DataError(Problem("data.field", data.field, reason, "Choose a text field, or drop such rows."))
                yield content
            done += len(batch[data.field])

    def read() -> Iterator[Document]:
        if validation is not None:
            yield from (Document(content, True) for content in rows("data.validation_path", validation))
        for number, content in enumerate(rows("data.path", train)):
            yield Document(content, validation is None and held_out(str(number), data.validation_fraction))

    identity = fingerprint(
        "hf", _identity(data, train), _identity(data, validation), data.field, data.validation_fraction, data.validation_path
    )
    return Documents(identity, read)


def _library() -> Any:
    try:
        return import_module("datasets")
    except ImportError as error:
        raise EnvError(
            "data.source=hf needs the datasets library, which is not installed: pip install 'anyshard[hf]'"
        ) from error


def _open_validation(datasets: Any, data: schema.Data) -> Any | None:
    """The dataset of data.validation_path: another path or hub id, or the name of a split of data.path."""
    named = data.validation_path
    if named is None:
        return None
    if "/" in named or Path(named).expanduser().exists():
        return _open(datasets, data, "data.validation_path", named, data.hf_split)
    assert data.path is not None
    return _open(datasets, data, "data.validation_path", data.path, named)


def _open(datasets: Any, data: schema.Data, key: str, path: str, split: str) -> Any:
    local = Path(path).expanduser()
    check_local(key, path)
    try:
        if (local / "state.json").exists() or (local / "dataset_dict.json").exists():
            return _saved_split(datasets.load_from_disk(str(local)), key, path, split)
        if local.is_file():
            return _load_files(datasets, data, key, local, split)
        where = str(local) if local.exists() else path
        return datasets.load_dataset(where, data.hf_config, split=split, streaming=data.streaming)
    except DataError:
        raise
    except Exception as error:  # datasets raises many kinds for a bad name, split or configuration
        text = str(error).strip().splitlines()
        reason = f"datasets cannot open split {split!r} of {path} ({text[0] if text else type(error).__name__})."
        value = getattr(data, key.removeprefix("data."))
        raise DataError(Problem(key, value, reason, "Check the path, data.hf_config and data.hf_split.")) from error


def _load_files(datasets: Any, data: schema.Data, key: str, file: Path, split: str) -> Any:
    if file.suffix not in _BUILDERS:
        fix = f"Give a folder, or a file that ends with one of {', '.join(_BUILDERS)}."
        raise DataError(Problem(key, file, "datasets does not know this kind of file.", fix))
    files = {split.partition("[")[0]: str(file)}  # the one file is the split, whatever its name
    return datasets.load_dataset(_BUILDERS[file.suffix], data_files=files, split=split, streaming=data.streaming)


def _saved_split(saved: Any, key: str, path: str, split: str) -> Any:
    if not hasattr(saved, "keys"):
        return saved
    if split not in saved:
        there = ", ".join(saved.keys())
        fixed = "data.hf_split" if key == "data.path" else key
        raise DataError(Problem(fixed, split, f"{path} has no such split.", f"It has: {there}."))
    return saved[split]


def _check_field(data: schema.Data, dataset: Any) -> None:
    columns = dataset.column_names
    if columns is None:  # some streams tell only by their first row
        columns = list(next(iter(islice(dataset, 1)), {data.field: ""}))
    if data.field not in columns:
        reason = f"the rows of {data.path} have no such field."
        raise DataError(Problem("data.field", data.field, reason, f"Set it to one of {', '.join(columns)}."))


def _identity(data: schema.Data, dataset: Any | None) -> object:
    """What tells this dataset from another: its own fingerprint, which a stream lacks."""
    if dataset is None:
        return None
    own = None if data.streaming else getattr(dataset, "_fingerprint", None)
    return own or (data.path, data.hf_config, data.hf_split, str(dataset.info.version))
