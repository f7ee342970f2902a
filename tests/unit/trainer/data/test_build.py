from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from anyshard.configs import registry, schema
from anyshard.configs.errors import ConfigError, DataError
from anyshard.trainer.data.build import Splits, build_data
from anyshard.trainer.data.documents import Document, Documents

MakeData = Callable[..., schema.Data]


def build(data: schema.Data, said: list[str] | None = None) -> Splits:
    return build_data(data, seed=1, say=said.append if said is not None else (lambda line: None))


def test_synthetic_by_default_keys(make_data: MakeData) -> None:
    said: list[str] = []
    splits = build(make_data(source="synthetic", num_samples=100, sequence_length=32), said)
    assert len(splits.train) == 100
    assert splits.validation is not None
    assert len(splits.validation) == 5
    assert splits.tokenizer.vocab_size == 257
    assert splits.tokenizer.decode(splits.train[0]["input_ids"]).isascii()
    assert "3,201 training tokens in 100 samples of 32, 161 validation tokens" in said[-1]


def test_text_with_bpe(make_data: MakeData, corpus: Path) -> None:
    data = make_data(source="text", path=str(corpus), tokenizer="bpe", bpe_vocab_size=280, sequence_length=8)
    splits = build(data)
    assert splits.tokenizer.vocab_size == 280
    text = splits.tokenizer.decode(splits.train[0]["input_ids"])
    assert any(text in file.read_text() for file in corpus.rglob("*.*") if file.suffix != ".png")


@pytest.mark.parametrize("pack", list(schema.Pack))
def test_packing(make_data: MakeData, pack: schema.Pack) -> None:
    splits = build(make_data(source="synthetic", num_samples=100, sequence_length=32, pack=pack))
    separate = pack is schema.Pack.documents
    assert ("position_ids" in splits.train[0]) is separate
    assert (splits.train.targets_per_sample is None) is separate


def test_fingerprint_changes_with_the_samples(make_data: MakeData) -> None:
    keys = {"source": "synthetic", "num_samples": 100, "sequence_length": 32}
    variants = [{}, {"num_samples": 101}, {"sequence_length": 16}, {"pack": schema.Pack.documents}, {"max_tokens": 500}]
    prints = {build(make_data(**{**keys, **variant})).fingerprint for variant in variants}
    assert len(prints) == len(variants)
    assert build(make_data(**keys)).fingerprint in prints


def test_notes_are_said_from_the_cache_too(make_data: MakeData, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 " * 100)
    data = make_data(source="text", path=str(tmp_path / "a.txt"), sequence_length=8)
    for _ in range(2):
        said: list[str] = []
        build(data, said)
        assert "100 byte sequences are not UTF-8" in said[-1]


def test_training_text_too_short(make_data: MakeData, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short")
    data = make_data(source="text", path=str(tmp_path / "a.txt"), validation_fraction=0.0)
    message = r"data\.sequence_length=512: the training text has 6 tokens, and one sample needs .* 513\. Set it to 5 or less"
    with pytest.raises(DataError, match=message):
        build(data)
    assert len(build(make_data(source="text", path=data.path, validation_fraction=0.0, sequence_length=5)).train) == 1


def test_no_training_text(make_data: MakeData, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match=r"has 0 tokens.* Use more text"):
        build(make_data(source="text", path=str(tmp_path / "a.jsonl")))


def test_held_out_text_too_short(make_data: MakeData, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a line\n" * 100)
    data = make_data(source="text", path=str(tmp_path / "a.txt"), sequence_length=64)
    said: list[str] = []
    assert build(data, said).validation is None
    assert "no validation: data.validation_fraction=0.05 holds out" in said[0]
    assert "one sample needs 65" in said[0]


def test_validation_path_too_short(make_data: MakeData, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a line\n" * 100)
    (tmp_path / "b.txt").write_text("a line\n")
    data = make_data(source="text", path=str(tmp_path / "a.txt"), validation_path=str(tmp_path / "b.txt"))
    data.sequence_length = 64
    with pytest.raises(DataError, match="the validation text has 8 tokens"):
        build(data)


def test_validation_turned_off(make_data: MakeData) -> None:
    said: list[str] = []
    splits = build(make_data(source="synthetic", num_samples=10, sequence_length=32, validation_fraction=0.0), said)
    assert splits.validation is None
    assert len(said) == 1


def test_a_bad_line_leaves_no_cache(make_data: MakeData, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"body": "not"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 2"):
        build(make_data(source="text", path=str(tmp_path / "a.jsonl")))
    assert [path for path in (tmp_path / "cache").rglob("*") if path.suffix == ".bin"] == []


def test_unknown_source(make_data: MakeData) -> None:
    with pytest.raises(ConfigError, match=r"data\.source=synthetik: .*Did you mean synthetic\?"):
        build(make_data(source="synthetik"))


def test_source_of_a_plugin(make_data: MakeData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._REGISTERED, "data", {})

    @registry.register("data", "squares")
    def squares(data: schema.Data, seed: int) -> Documents:
        def read() -> Iterator[Document]:
            for number in range(data.options["count"]):
                yield Document(str(number**2), validation=number % 10 == 0)

        return Documents(fingerprint=f"squares {data.options}", read=read)

    splits = build(make_data(source="squares", options={"count": 100}, sequence_length=16))
    assert splits.tokenizer.decode(splits.train[0]["input_ids"]).startswith("1491625")
    assert splits.validation is not None
