from __future__ import annotations

import errno
import math
import os
import sysconfig
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from anyshard.configs import schema
from anyshard.configs.errors import DataError
from anyshard.trainer.data.documents import Documents
from anyshard.trainer.data.sources import python_stdlib, synthetic, text

MakeData = Callable[..., schema.Data]


def split(documents: Documents) -> tuple[list[str], list[str]]:
    """Training and validation texts."""
    found = list(documents.read())
    return [d.text for d in found if not d.validation], [d.text for d in found if d.validation]


def test_stdlib_is_real_source_text(make_data: MakeData) -> None:
    documents = python_stdlib(make_data(source="python_stdlib"), 0)
    train, validation = split(documents)
    num_bytes = sum(len(content.encode()) for content in train + validation)
    assert num_bytes == documents.num_bytes
    assert 8e6 < num_bytes < 30e6
    assert 0.01 < sum(map(len, validation)) / num_bytes < 0.2
    assert any("class ArgumentParser" in content for content in train + validation)
    assert python_stdlib(make_data(), 1).fingerprint == documents.fingerprint
    assert split(documents) == (train, validation)


def test_stdlib_without_sources(make_data: MakeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(DataError, match=r"data\.source=python_stdlib: .* holds no \.py files"):
        python_stdlib(make_data(source="python_stdlib"), 0)


@pytest.mark.parametrize("source", [python_stdlib, synthetic])
@pytest.mark.parametrize("name", ["path", "validation_path"])
def test_sources_without_files_refuse_paths(make_data: MakeData, source: Callable[..., Documents], name: str) -> None:
    with pytest.raises(DataError, match=rf"data\.{name}=/x: .*Use data=text"):
        source(make_data(**{name: "/x"}), 0)


def test_folder(make_data: MakeData, corpus: Path) -> None:
    train, validation = split(text(make_data(path=str(corpus)), 0))
    assert len(train) + len(validation) == 6  # and not image.png
    assert len(validation) == 1
    assert split(text(make_data(path=str(corpus)), 7)) == (train, validation)


def test_glob_and_file(make_data: MakeData, corpus: Path) -> None:
    train, validation = split(text(make_data(path=str(corpus / "*.txt")), 0))
    assert len(train) + len(validation) == 5
    train, validation = split(text(make_data(path=str(corpus / "**" / "*.md"), validation_fraction=0.0), 0))
    assert (train, validation) == (["# Notes\nsome notes\n"], [])


def test_the_end_of_a_single_file_is_held_out(make_data: MakeData, tmp_path: Path) -> None:
    lines = [f"line {i}\n" for i in range(1000)]
    (tmp_path / "book.txt").write_text("".join(lines))
    train, validation = split(text(make_data(path=str(tmp_path / "book.txt")), 0))
    assert "".join(train + validation) == "".join(lines)
    assert 40 < validation[0].count("\n") < 60
    train, validation = split(text(make_data(path=str(tmp_path / "book.txt"), validation_fraction=0.0), 0))
    assert ("".join(train), validation) == ("".join(lines), [])


def test_jsonl_is_split_by_line(make_data: MakeData, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"body": "document {i}"}}\n' for i in range(1000)))
    data = make_data(path=str(tmp_path), field="body", validation_fraction=0.1)
    train, validation = split(text(data, 0))
    assert sorted(train + validation) == sorted(f"document {i}" for i in range(1000))
    assert 60 < len(validation) < 140


def test_validation_path(make_data: MakeData, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_bytes(b"held out \xff")
    documents = text(make_data(path=str(corpus), validation_path=str(tmp_path / "held.txt")), 0)
    train, validation = split(documents)
    assert (len(train), validation) == (6, ["held out \ufffd"])
    assert "held.txt" in documents.notes()[0]
    assert documents.fingerprint != text(make_data(path=str(corpus)), 0).fingerprint


def test_fingerprint_follows_the_files(make_data: MakeData, corpus: Path) -> None:
    data = make_data(path=str(corpus))
    before = text(data, 0).fingerprint
    assert text(data, 1).fingerprint == before
    (corpus / "new.txt").write_text("more")
    assert text(data, 0).fingerprint != before


@pytest.mark.parametrize("key", ["path", "validation_path"])
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{corpus}/nothing", "there is no such file or folder"),
        ("{corpus}/*.nothing", "matches no file"),
        ("{corpus}/blank", r"this folder holds no \.txt, \.md or \.jsonl file"),
        ("{corpus}/void.txt", "this file is empty"),
        ("{corpus}/void*.txt", "all 2 files are empty"),
        ("{corpus}/dangling.txt", "cannot be read"),
        ("{corpus}/dang*.txt", "cannot be read"),
    ],
)
def test_bad_paths(make_data: MakeData, corpus: Path, key: str, path: str, message: str) -> None:
    (corpus / "blank").mkdir()
    (corpus / "void.txt").touch()
    (corpus / "void2.txt").touch()
    keys = {"path": str(corpus / "0.txt"), key: path.format(corpus=corpus)}
    if "dang" in path:
        (corpus / "dangling.txt").symlink_to("nowhere")
    with pytest.raises(DataError, match=rf"data\.{key}={corpus}/.*{message}"):
        text(make_data(source="text", **keys), 0)


def test_text_needs_a_path(make_data: MakeData) -> None:
    with pytest.raises(DataError, match=r"data\.path=null: source text needs it"):
        text(make_data(source="text"), 0)


def test_folder_that_cannot_be_listed(make_data: MakeData, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:  # root may list anything
        real = os.scandir

        def refuse(path: str) -> object:
            if str(path).endswith("sub"):
                raise PermissionError(errno.EACCES, "Permission denied", path)
            return real(path)

        monkeypatch.setattr(os, "scandir", refuse)
    else:
        (corpus / "sub").chmod(0)
    with pytest.raises(DataError, match=r"sub: cannot be read \(Permission denied\)"):
        text(make_data(path=str(corpus)), 0)


def test_synthetic_depends_on_the_seed_alone(make_data: MakeData) -> None:
    data = make_data(source="synthetic", num_samples=300, sequence_length=64)
    documents = synthetic(data, 3)
    train, validation = split(documents)
    assert split(synthetic(data, 3)) == (train, validation)
    assert split(synthetic(data, 4))[0] != train
    assert synthetic(data, 4).fingerprint != documents.fingerprint
    assert train[0] != validation[0]
    assert train[0].startswith("4Fjxlyr BYko")  # the same on every machine and with every version of numpy


@pytest.mark.parametrize("num_samples", [1, 50, 3000])
def test_synthetic_makes_exactly_so_many_tokens(make_data: MakeData, num_samples: int) -> None:
    data = make_data(source="synthetic", num_samples=num_samples, sequence_length=64)
    train, validation = split(synthetic(data, 0))
    assert sum(len(document) + 1 for document in train) == num_samples * 64 + 1
    assert sum(len(document) + 1 for document in validation) in (0, round(num_samples * 0.05) * 64 + 1)


def test_synthetic_is_learnable(make_data: MakeData) -> None:
    train, _ = split(synthetic(make_data(num_samples=4000, sequence_length=128), 0))
    letters = Counter("".join(train))
    pairs = Counter(pair for document in train for pair in pairwise(document))
    total = letters.total()
    unigram = -sum(n / total * math.log(n / total) for n in letters.values())
    total = pairs.total()
    firsts = Counter()
    for (first, _), n in pairs.items():
        firsts[first] += n
    bigram = -sum(n / total * math.log(n / firsts[first]) for (first, _), n in pairs.items())
    assert 4.0 < unigram < 4.2
    assert 1.35 < bigram < 1.6
