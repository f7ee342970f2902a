from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from anyshard.configs.errors import CheckpointError
from anyshard.trainer.checkpoint.interop.safetensors_file import CODES, Entry, shards, write_file


def test_every_type_comes_back(tmp_path: Path) -> None:
    tensors = {f"t.{name}": torch.randint(0, 2, (3, 5)).to(getattr(torch, name)) for name in CODES}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "transposed": torch.arange(6.0).view(2, 3).T}
    entries = [Entry(name, str(each.dtype).removeprefix("torch."), tuple(each.shape)) for name, each in tensors.items()]
    written = list(write_file(tmp_path / "x.safetensors", entries, tensors.items()))
    assert sum(written) == sum(each.numel() * each.element_size() for each in tensors.values())
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor)


def test_values_are_cast_in_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anyshard.trainer.checkpoint.interop.safetensors_file._SLICE_NUMEL", 7)
    tensor = torch.randn(11, 3)
    list(write_file(tmp_path / "x.safetensors", [Entry("w", "bfloat16", (11, 3))], [("w", tensor)]))
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("w"), tensor.bfloat16())


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="w is complex128, which safetensors does not know"):
        list(write_file(tmp_path / "a", [Entry("w", "complex128", (1,))], []))
    with pytest.raises(CheckpointError, match=r"w of shape \(2,\) came as v of \(2,\)"):
        list(write_file(tmp_path / "b", [Entry("w", "float32", (2,))], [("v", torch.zeros(2))]))


def test_shards() -> None:
    entries = [Entry(str(size), "uint8", (size,)) for size in (4, 5, 1, 30, 2, 3)]
    assert [[entry.name for entry in part] for part in shards(entries, 10)] == [["4", "5", "1"], ["30"], ["2", "3"]]
    assert shards([], 10) == []
