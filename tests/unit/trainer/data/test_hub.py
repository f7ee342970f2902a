from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import huggingface_hub.constants
import pytest

from anyshard.configs import schema
from anyshard.configs.errors import DataError, EnvError
from anyshard.trainer.data.documents import Documents
from anyshard.trainer.data.hub import hf

MakeData = Callable[..., schema.Data]
ROWS = {"text": [f"document {i}" for i in range(600)], "id": list(range(600))}


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, no progress bars, and the library's cache in the test's folder."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")
    datasets.disable_progress_bars()


def split(documents: Documents) -> tuple[list[str], list[str]]:
    found = list(documents.read())
    return [d.text for d in found if not d.validation], [d.text for d in found if d.validation]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    rows = datasets.Dataset.from_dict(ROWS)
    held = datasets.Dataset.from_dict({"text": ["held out"], "id": [0]})
    datasets.DatasetDict({"train": rows, "test": held}).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_saved_folder(make_data: MakeData, saved: Path) -> None:
    data = make_data(source="hf", path=str(saved))
    documents = hf(data, 0)
    train, validation = split(documents)
    assert sorted(train + validation) == sorted(ROWS["text"])
    assert 10 < len(validation) < 60
    assert hf(data, 1).fingerprint == documents.fingerprint
    assert split(hf(make_data(source="hf", path=str(saved), hf_split="test", validation_fraction=0.0), 0)) == (["held out"], [])


def test_single_dataset_folder(make_data: MakeData, tmp_path: Path) -> None:
    datasets.Dataset.from_dict(ROWS).save_to_disk(tmp_path / "one")
    train, validation = split(hf(make_data(source="hf", path=str(tmp_path / "one")), 0))
    assert len(train) + len(validation) == 600


def test_validation_is_another_split_or_path(make_data: MakeData, saved: Path, tmp_path: Path) -> None:
    train, validation = split(hf(make_data(source="hf", path=str(saved), validation_path="test"), 0))
    assert (len(train), validation) == (600, ["held out"])
    (tmp_path / "held.jsonl").write_text('{"text": "from a file"}\n')
    data = make_data(source="hf", path=str(saved), validation_path=str(tmp_path / "held.jsonl"))
    assert split(hf(data, 0))[1] == ["from a file"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("folder", [False, True])
def test_data_files(make_data: MakeData, tmp_path: Path, streaming: bool, folder: bool) -> None:
    (tmp_path / "rows").mkdir()
    datasets.Dataset.from_dict(ROWS).to_parquet(tmp_path / "rows" / "part.parquet")
    path = tmp_path / "rows" / ("" if folder else "part.parquet")
    train, validation = split(hf(make_data(source="hf", path=str(path), streaming=streaming), 0))
    assert sorted(train + validation) == sorted(ROWS["text"])


def test_fingerprint_tells_splits_and_fields_apart(make_data: MakeData, saved: Path) -> None:
    prints = {
        hf(make_data(source="hf", path=str(saved), **keys), 0).fingerprint
        for keys in ({}, {"hf_split": "test"}, {"validation_path": "test"}, {"validation_fraction": 0.1})
    }
    assert len(prints) == 4


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"path": None}, r"data\.path=null: source hf needs it"),
        ({"path": "/nowhere/at/all"}, r"data\.path=/nowhere/at/all: there is no such file or folder"),
        ({"hf_split": "dev"}, r"data\.hf_split=dev: .* has no such split\. It has: train, test\."),
        ({"validation_path": "dev"}, r"data\.validation_path=dev: .* has no such split"),
        ({"field": "body"}, r"data\.field=body: .* no such field\. Set it to one of text, id\."),
        ({"path": "nobody/nothing"}, r"data\.path=nobody/nothing: datasets cannot open split 'train'"),
    ],
)
def test_bad_keys(make_data: MakeData, saved: Path, keys: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        hf(make_data(source="hf", **{"path": str(saved), **keys}), 0)


def test_unknown_kind_of_file(make_data: MakeData, tmp_path: Path) -> None:
    (tmp_path / "a.xyz").write_text("x")
    with pytest.raises(DataError, match=r"data\.path=.*a\.xyz: datasets does not know this kind of file"):
        hf(make_data(source="hf", path=str(tmp_path / "a.xyz")), 0)


def test_field_that_is_no_text(make_data: MakeData, saved: Path) -> None:
    with pytest.raises(DataError, match=r"data\.field=id: row 0 of data\.path holds int, not text"):
        list(hf(make_data(source="hf", path=str(saved), field="id"), 0).read())


def test_without_the_library(make_data: MakeData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(EnvError, match=r"pip install 'anyshard\[hf\]'"):
        hf(make_data(source="hf", path="x"), 0)
