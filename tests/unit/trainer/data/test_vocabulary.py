"""The size of a tokenizer from its file, held against the libraries that read it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from anyshard.configs.errors import DataError
from anyshard.trainer.data.files import is_missing_path
from anyshard.trainer.data.tokenizers import load_tokenizer
from anyshard.trainer.data.vocabulary import tokenizer_ids


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    from tokenizers import Tokenizer, models

    backend = Tokenizer(models.WordLevel({"a": 0, "b": 4}, unk_token="a"))
    backend.add_special_tokens(["<|endoftext|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_as_many_ids_as_the_library_counts(tokenizer: Path) -> None:
    assert tokenizer_ids(str(tokenizer)) == load_tokenizer(str(tokenizer)).vocab_size
    assert tokenizer_ids(str(tokenizer.parent)) == tokenizer_ids(str(tokenizer))


def test_a_vocabulary_without_numbers(tokenizer: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.Unigram([("a", 0.0), ("b", -1.0), ("c", -2.0)])).save(str(tokenizer))
    assert tokenizer_ids(str(tokenizer)) == 3


@pytest.mark.parametrize("name", ["bytes", "bpe", "gpt2", "someone/model"])
def test_what_is_no_path_is_not_known_here(name: str) -> None:
    assert tokenizer_ids(name) is None
    assert not is_missing_path(name)


@pytest.mark.parametrize("name", ["./x", "~/no-such-file", "/no/such/folder", "tokenizer.json", "a/b/c"])
def test_a_path_to_nothing(name: str) -> None:
    with pytest.raises(DataError, match="there is no such file or folder"):
        tokenizer_ids(name)


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"model": {}}), json.dumps({"model": {"vocab": {}}})])
def test_what_is_wrong_with_a_file_the_library_says(tokenizer: Path, content: str) -> None:
    tokenizer.write_text(content)
    assert tokenizer_ids(str(tokenizer)) is None
