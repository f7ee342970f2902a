from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyshard.configs import schema
from anyshard.configs.errors import DataError, EnvError
from anyshard.trainer.data.tokenizers import (
    ByteTokenizer,
    Tokenizer,
    build_tokenizer,
    load_tokenizer,
    save_tokenizer,
    vocab_size,
)

TEXTS = [f"def function_{i}(argument):\n    return argument + {i}  # the sum\n" for i in range(200)]
MakeData = Callable[..., schema.Data]


def build(data: schema.Data, texts: list[str] = TEXTS, said: list[str] | None = None) -> Tokenizer:
    say = said.append if said is not None else (lambda line: None)
    return build_tokenizer(data, source_fingerprint="corpus", texts=lambda: texts, say=say)


@given(st.lists(st.text(), max_size=4))
def test_bytes_round_trip(texts: list[str]) -> None:
    tokenizer = ByteTokenizer()
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert ids.tolist() == list(text.encode())
        assert tokenizer.decode([*ids, tokenizer.eos_id]) == text


def test_bytes_that_are_no_text() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode_batch(["a\ud800"])[0].tolist() == [97, ord("?")]
    assert tokenizer.decode([0xC3, 97]) == "\N{REPLACEMENT CHARACTER}a"


def test_bpe_is_trained_once_and_fits_the_text(make_data: MakeData) -> None:
    data = make_data(tokenizer="bpe", bpe_vocab_size=300)
    said: list[str] = []
    tokenizer = build(data, said=said)
    again = build_tokenizer(data, source_fingerprint="corpus", texts=lambda: pytest.fail("trained again"), say=said.append)
    assert [line for line in said if "training a BPE of 300 tokens" in line] == said
    assert tokenizer.fingerprint == again.fingerprint
    assert tokenizer.vocab_size == 300
    ids = tokenizer.encode_batch(TEXTS)
    assert [tokenizer.decode(row) for row in ids] == TEXTS
    assert sum(map(len, ids)) < 0.5 * sum(map(len, TEXTS))
    assert tokenizer.decode(tokenizer.encode_batch(["never seen: äß漢"])[0]) == "never seen: äß漢"


def test_bpe_is_deterministic(make_data: MakeData, tmp_path: Path) -> None:
    tokenizers = [build(make_data(tokenizer="bpe", bpe_vocab_size=300, cache_dir=str(tmp_path / name))) for name in ("a", "b")]
    assert tokenizers[0].fingerprint == tokenizers[1].fingerprint


def test_end_of_text_written_in_a_document_is_text(make_data: MakeData) -> None:
    tokenizer = build(make_data(tokenizer="bpe", bpe_vocab_size=300))
    ids = tokenizer.encode_batch(["a<|endoftext|>b"])[0]
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == "a<|endoftext|>b"


def test_bpe_larger_than_the_corpus_allows(make_data: MakeData) -> None:
    data = make_data(tokenizer="bpe", bpe_vocab_size=5000)
    with pytest.raises(
        DataError, match=r"data\.bpe_vocab_size=5000: .* only enough text for (\d+) tokens\. Set it to \1 or less"
    ):
        build(data)


def test_bpe_cache_that_is_damaged_is_trained_again(make_data: MakeData, tmp_path: Path) -> None:
    data = make_data(tokenizer="bpe", bpe_vocab_size=300)
    whole = build(data)
    (file,) = (tmp_path / "cache").rglob("tokenizer.json")
    file.write_text(file.read_text()[:100])
    said: list[str] = []
    assert build(data, said=said).fingerprint == whole.fingerprint
    assert "damaged" in said[0]


def test_tokenizer_by_path(make_data: MakeData, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    trained = build(make_data(tokenizer="bpe", bpe_vocab_size=300))
    (file,) = (tmp_path / "cache").rglob("tokenizer.json")
    folder = tmp_path / "saved"
    PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<|endoftext|>").save_pretrained(folder)
    text = TEXTS[0] + "<|endoftext|>"
    for path in (file, folder, folder / "tokenizer.json"):
        loaded = load_tokenizer(str(path))
        assert (loaded.vocab_size, loaded.eos_id) == (trained.vocab_size, trained.eos_id)
        assert loaded.encode_batch([text])[0].tolist() == trained.encode_batch([text])[0].tolist()
        assert loaded.decode(loaded.encode_batch([text])[0]) == text
        assert loaded.fingerprint == load_tokenizer(str(path)).fingerprint
        assert vocab_size(make_data(tokenizer=str(path))) == 300


def test_vocab_size_without_a_corpus(make_data: MakeData) -> None:
    assert vocab_size(make_data()) == 257
    assert vocab_size(make_data(tokenizer="bpe", bpe_vocab_size=999)) == 999


def test_end_of_text_token_of_a_bare_file(make_data: MakeData, tmp_path: Path) -> None:
    build(make_data(tokenizer="bpe", bpe_vocab_size=300))
    (file,) = (tmp_path / "cache").rglob("tokenizer.json")
    renamed = tmp_path / "tokenizer.json"
    renamed.write_text(file.read_text().replace("<|endoftext|>", "<|done|>"))
    with pytest.raises(DataError, match=r"has no end-of-text token.*eos_token in the tokenizer_config.json"):
        load_tokenizer(str(renamed))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|done|>"}}))
    assert load_tokenizer(str(renamed)).eos_id == 0


def test_folder_without_end_of_text_token(make_data: MakeData, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    build(make_data(tokenizer="bpe", bpe_vocab_size=300))
    (file,) = (tmp_path / "cache").rglob("tokenizer.json")
    PreTrainedTokenizerFast(tokenizer_file=str(file)).save_pretrained(tmp_path / "saved")
    with pytest.raises(DataError, match="has no end-of-text token"):
        load_tokenizer(str(tmp_path / "saved"))


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "nowhere.json", "a/b/c"])
def test_path_that_is_not_there(name: str) -> None:
    with pytest.raises(DataError, match="there is no such file or folder"):
        load_tokenizer(name)


def test_name_that_the_hub_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"data\.tokenizer=byte: the Hugging Face hub gave no tokenizer.*Did you mean bytes\?"):
        load_tokenizer("byte")


def test_files_that_are_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(DataError, match=r"not a tokenizer.json"):
        load_tokenizer(str(tmp_path / "x.json"))
    with pytest.raises(DataError, match="this folder gave no tokenizer"):
        load_tokenizer(str(tmp_path))


@pytest.fixture(scope="module")
def saved_bytes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bytes") / "tokenizer"
    save_tokenizer(ByteTokenizer(), folder)
    return folder


@given(st.text())
def test_saved_bytes_make_the_same_ids_in_transformers(saved_bytes: Path, text: str) -> None:
    ours, theirs = ByteTokenizer(), load_tokenizer(str(saved_bytes))
    assert (theirs.vocab_size, theirs.eos_id) == (ours.vocab_size, ours.eos_id)
    assert theirs.encode_batch([text])[0].tolist() == ours.encode_batch([text])[0].tolist()
    assert theirs.decode([*text.encode(), ours.eos_id]) == text


def test_saved_tokenizers_make_the_same_ids_in_transformers(make_data: MakeData, tmp_path: Path) -> None:
    bpe = build(make_data(tokenizer="bpe", bpe_vocab_size=300))
    save_tokenizer(bpe, tmp_path / "bpe")
    loaded = load_tokenizer(str(tmp_path / "bpe"))
    save_tokenizer(loaded, tmp_path / "again")
    for each in (loaded, load_tokenizer(str(tmp_path / "again"))):
        assert (each.vocab_size, each.eos_id) == (bpe.vocab_size, bpe.eos_id)
        assert [ids.tolist() for ids in each.encode_batch(TEXTS)] == [ids.tolist() for ids in bpe.encode_batch(TEXTS)]


def test_a_saved_tokenizer_takes_the_place_of_an_older_one(make_data: MakeData, tmp_path: Path) -> None:
    save_tokenizer(build(make_data(tokenizer="bpe", bpe_vocab_size=300)), tmp_path / "run" / "tokenizer")
    save_tokenizer(ByteTokenizer(), tmp_path / "run" / "tokenizer")
    assert load_tokenizer(str(tmp_path / "run" / "tokenizer")).vocab_size == 257
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["tokenizer"]
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvError, match="a file is in the way"):
        save_tokenizer(ByteTokenizer(), tmp_path / "file" / "tokenizer")
