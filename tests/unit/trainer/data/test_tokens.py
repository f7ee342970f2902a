from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyshard.trainer.data import tokens as tokens_module
from anyshard.trainer.data.documents import Document, Documents
from anyshard.trainer.data.tokenizers import ByteTokenizer
from anyshard.trainer.data.tokens import NO_TARGET, TokenDataset, TokenMeta, damage, tokenize

DOCUMENTS = [Document("hello"), Document(""), Document("held out", validation=True), Document("ab"), Document("world")]
TRAIN = [*b"hello", 256, *b"ab", 256, *b"world", 256]


def silent(line: str) -> None:
    pass


def write(root: Path, documents: list[Document] = DOCUMENTS, max_tokens: int | None = None, name: str = "corpus") -> Path:
    corpus = Documents(name, lambda: iter(documents), notes=lambda: ["a note"])
    return tokenize(corpus, ByteTokenizer(), root=root, max_tokens=max_tokens, say=silent)


def all_tokens(folder: Path, split: str = "train") -> list[int]:
    return np.fromfile(folder / f"{split}.bin", dtype=TokenMeta.load(folder).dtype).tolist()


def ends(folder: Path, split: str = "train") -> list[int]:
    return np.fromfile(folder / f"{split}.ends", dtype=np.int64).tolist()


def test_files(tmp_path: Path) -> None:
    folder = write(tmp_path)
    assert all_tokens(folder) == TRAIN
    assert ends(folder) == [6, 9, 15]
    assert all_tokens(folder, "validation") == [*b"held out", 256]
    meta = TokenMeta.load(folder)
    assert (meta.dtype, meta.notes) == ("uint16", ["a note"])
    assert meta.num_tokens == {"train": 15, "validation": 9}
    assert meta.num_documents == {"train": 3, "validation": 1}


def test_batches_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "_BATCH_CHARS", 1)
    folder = write(tmp_path)
    assert (all_tokens(folder), ends(folder)) == (TRAIN, [6, 9, 15])


@pytest.mark.parametrize("max_tokens", [1, 5, 6, 7, 14, 15, 100])
def test_max_tokens(tmp_path: Path, max_tokens: int) -> None:
    folder = write(tmp_path, max_tokens=max_tokens)
    assert all_tokens(folder) == TRAIN[:max_tokens]
    total = min(max_tokens, 15)
    assert ends(folder) == [*(end for end in [6, 9, 15] if end < total), total]


def test_max_tokens_stops_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "_BATCH_CHARS", 1)

    def endless() -> object:
        while True:
            yield Document("text")

    folder = tokenize(Documents("x", endless), ByteTokenizer(), root=tmp_path, max_tokens=1000, say=silent)
    assert TokenMeta.load(folder).num_tokens["train"] == 1000


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    tokenizer.vocab_size, tokenizer.eos_id, tokenizer.fingerprint = 100_000, 99_999, "large"
    folder = tokenize(Documents("x", lambda: iter(DOCUMENTS)), tokenizer, root=tmp_path, max_tokens=None, say=silent)
    assert TokenMeta.load(folder).dtype == "uint32"
    assert all_tokens(folder) == [99_999 if token == 256 else token for token in TRAIN]


def test_cached_by_corpus_tokenizer_and_length(tmp_path: Path) -> None:
    first = write(tmp_path)
    assert write(tmp_path, [Document("not read")]) == first
    assert all_tokens(first) == TRAIN
    assert len({first, write(tmp_path, name="other"), write(tmp_path, max_tokens=3)}) == 3


@pytest.mark.parametrize("name", ["train.bin", "train.ends", "validation.bin", "meta.json"])
@pytest.mark.parametrize("how", ["truncate", "remove", "extend"])
def test_a_damaged_cache_is_built_again(tmp_path: Path, name: str, how: str) -> None:
    folder = write(tmp_path)
    assert damage(folder) is None
    file = folder / name
    content = file.read_bytes()
    if how == "remove":
        file.unlink()
    else:
        file.write_bytes(content[:-2] if how == "truncate" else content + b"xx")
    assert damage(folder) is not None
    assert all_tokens(write(tmp_path)) == TRAIN


def test_meta_of_another_version_is_damage(tmp_path: Path) -> None:
    folder = write(tmp_path)
    (folder / "meta.json").write_text('{"colour": "blue"}')
    assert "colour" in str(damage(folder))


def test_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "_PROGRESS_S", 0.0)
    monkeypatch.setattr(tokens_module, "_BATCH_CHARS", 1)
    said: list[str] = []
    for num_bytes, expected in ((20_000_000, "tokenising 5/20 MB (25%)"), (None, "tokenising 5 MB,")):
        corpus = Documents(f"of {num_bytes}", lambda: iter([Document("x" * 5_000_000)]), num_bytes)
        tokenize(corpus, ByteTokenizer(), root=tmp_path, max_tokens=None, say=said.append)
        assert expected in said[-1]
        assert "MB/s, 5.0M tokens" in said[-1]


def dataset(lengths: list[int], sequence_length: int, *, separate: bool) -> TokenDataset:
    """Documents of these lengths; the tokens count up, so that each shows where it is from."""
    offsets = np.cumsum(lengths)
    return TokenDataset(
        np.arange(offsets[-1], dtype=np.uint16),
        offsets.astype(np.int64),
        sequence_length=sequence_length,
        separate_documents=separate,
    )


def test_stream_samples() -> None:
    data = dataset([5, 5, 4], 4, separate=False)
    assert (len(data), data.targets_per_sample, data.num_tokens) == (3, 4, 14)
    assert {name: column.tolist() for name, column in data[2].items()} == {
        "input_ids": [8, 9, 10, 11],
        "labels": [9, 10, 11, 12],
    }
    assert all(column.dtype == np.int64 for column in data[0].values())


def test_separate_documents() -> None:
    data = dataset([3, 1, 6, 4], 6, separate=True)
    assert (len(data), data.targets_per_sample) == (2, None)
    first, second = data[0], data[1]
    assert first["labels"].tolist() == [1, 2, -100, -100, 5, 6]
    assert first["position_ids"].tolist() == [0, 1, 2, 0, 0, 1]
    # a document that began in the sample before counts from the sample's start: what it cannot see has no position
    assert second["labels"].tolist() == [7, 8, 9, -100, 11, 12]
    assert second["position_ids"].tolist() == [0, 1, 2, 3, 0, 1]


def test_document_that_ends_with_its_sample() -> None:
    data = dataset([4, 5], 4, separate=True)
    assert data[0]["labels"].tolist() == [1, 2, 3, -100]
    assert data[0]["position_ids"].tolist() == [0, 1, 2, 3]
    assert data[1]["labels"].tolist() == [5, 6, 7, 8]


@given(st.lists(st.integers(1, 30), min_size=2, max_size=40), st.integers(2, 20), st.data())
def test_documents_by_the_definition(lengths: list[int], sequence_length: int, draw: st.DataObject) -> None:
    data = dataset(lengths, sequence_length, separate=True)
    if not len(data):
        return
    indices = np.array(draw.draw(st.lists(st.integers(0, len(data) - 1), min_size=1, max_size=6)))
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    batch = data.batch(indices)
    for row, index in enumerate(indices):
        at = index * sequence_length + np.arange(sequence_length)
        same = document_of[at] == document_of[at + 1]
        start = np.searchsorted(document_of, document_of[at])
        assert np.array_equal(batch["input_ids"][row], at)
        assert np.array_equal(batch["labels"][row], np.where(same, at + 1, NO_TARGET))
        assert np.array_equal(batch["position_ids"][row], at - np.maximum(start, at[0]))
        sample = data[int(index)]
        assert all(np.array_equal(sample[name], batch[name][row]) for name in batch)


@pytest.mark.parametrize("separate", [False, True])
def test_samples_of_a_file(tmp_path: Path, separate: bool) -> None:
    folder = write(tmp_path)
    data = TokenDataset.open(folder, "train", sequence_length=3, separate_documents=separate)
    assert len(data) == 4
    assert data[1]["input_ids"].tolist() == [*b"lo", 256]
    assert data[1]["labels"].tolist() == [ord("o"), 256, -100 if separate else ord("a")]
    batch = data.batch(np.array([3, 1]))
    assert batch["input_ids"].tolist() == [[*b"wor"], [*b"lo", 256]]


def test_changing_a_sample_changes_nothing_else(tmp_path: Path) -> None:
    data = TokenDataset.open(write(tmp_path), "train", sequence_length=3, separate_documents=False)
    sample = data[0]
    sample["labels"][:] = NO_TARGET
    assert sample["input_ids"].tolist() == [*b"hel"]
    assert data[0]["labels"].tolist() == [*b"ell"]


def test_too_short_for_a_sample(tmp_path: Path) -> None:
    folder = write(tmp_path, [Document("abc")])
    assert len(TokenDataset.open(folder, "train", sequence_length=3, separate_documents=False)) == 1
    assert len(TokenDataset.open(folder, "train", sequence_length=4, separate_documents=False)) == 0
    assert len(TokenDataset.open(folder, "validation", sequence_length=2, separate_documents=True)) == 0


@pytest.mark.parametrize("index", [-1, 3])
def test_sample_out_of_range(index: int) -> None:
    with pytest.raises(IndexError, match="of a dataset of 3"):
        dataset([14], 4, separate=False)[index]
