"""What every registered source of documents must do: read the same twice, split stably, tell when it is another."""

from __future__ import annotations

import json
from importlib.resources import files

import pytest

from anyshard.configs import registry, schema

NAMES = registry.names("data")


def options(name: str, folder) -> schema.Data:
    """The smallest working configuration of a source."""
    data = schema.Data(source=name, num_samples=8, sequence_length=16, validation_fraction=0.25)
    if name in ("text", "hf"):
        pytest.importorskip("datasets") if name == "hf" else None
        lines = [json.dumps({"text": f"document {number} " * 4}) for number in range(40)]
        (folder / "documents.jsonl").write_text("\n".join(lines) + "\n")
        data.path = str(folder / "documents.jsonl")
    return data


def read(data: schema.Data, name: str, seed: int = 1):
    documents = registry.lookup("data", name, key="data.source")(data, seed)
    return documents.fingerprint, [(document.text, document.validation) for document in documents.read()]


@pytest.mark.parametrize("name", NAMES)
def test_reading_twice_gives_the_same_documents_and_split(tmp_path, name):
    data = options(name, tmp_path)
    first, second = read(data, name), read(data, name)
    assert first == second
    assert {validation for _, validation in first[1]} == {False, True}
    assert all(isinstance(text, str) and text for text, _ in first[1])


@pytest.mark.parametrize("name", NAMES)
def test_another_split_has_another_fingerprint(tmp_path, name):
    data = options(name, tmp_path)
    before, _ = read(data, name)
    data.validation_fraction = 0.4
    assert read(data, name)[0] != before


@pytest.mark.parametrize("name", NAMES)
def test_has_a_choice_of_its_name(name):
    assert (files("anyshard.configs") / "data" / f"{name}.yaml").is_file()
