"""How many ids a tokenizer by path has, from its file alone: the launcher, which imports no tokenizer library, asks too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from anyshard.configs.errors import DataError, Problem
from anyshard.configs.schema import BUILT_IN_TOKENIZERS
from anyshard.trainer.data.files import is_missing_path


def tokenizer_ids(name: str) -> int | None:
    """Ids of the tokenizer.json that `data.tokenizer` names, itself or its folder; None where there is no such file.

    Raises:
        DataError: it is a path, and nothing is there.
    """
    path = Path(name).expanduser()
    if is_missing_path(name):
        reason, fix = (
            "there is no such file or folder.",
            "Set bytes, bpe, the path of a tokenizer.json or of its folder, or a hub id.",
        )
        raise DataError(Problem("data.tokenizer", name, reason, fix))
    file = path / "tokenizer.json" if path.is_dir() else path
    if name in BUILT_IN_TOKENIZERS or not file.is_file():
        return None
    try:
        return _count(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None  # the library that reads it says what is wrong


def _count(content: dict[str, Any]) -> int:
    vocabulary = content["model"]["vocab"]
    ids = range(len(vocabulary)) if isinstance(vocabulary, list) else vocabulary.values()
    return 1 + max(int(i) for i in [*ids, *(token["id"] for token in content.get("added_tokens", []))])
