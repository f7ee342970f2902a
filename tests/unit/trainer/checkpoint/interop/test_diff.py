from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import Values, some_values, write_checkpoint
from helpers.interop import silent

from anyshard.configs.errors import CheckpointError
from anyshard.trainer.checkpoint.interop.diff import diff
from anyshard.trainer.checkpoint.interop.source import Stored


def compare(tmp_path: Path, b: Values, *, weights_only: bool = False, **changes: Any) -> dict[str, Any]:
    left = write_checkpoint(tmp_path / "a", some_values(), world_size=3)
    right = write_checkpoint(tmp_path / "b", b, world_size=2, chunk_bytes=128, **changes)
    return diff(Stored(left), Stored(right), weights_only=weights_only, report=silent)


def test_the_same_in_another_layout(tmp_path: Path) -> None:
    result = compare(tmp_path, some_values())
    assert result["differences"] == []
    assert result["num_equal"] == result["num_tensors"] == 6


def test_values(tmp_path: Path) -> None:
    values = some_values()
    values["a.weight", "param"][2, 3] += 1.0
    values["a.weight", "param"][5, 1] = float("nan")
    values["seen", "buffer"][1, 2] = 50
    result = compare(tmp_path, values)
    weight, seen = result["differences"]
    assert weight == {
        "name": "a.weight",
        "key": "param",
        "what": "values",
        "max_abs": float("inf"),
        "max_rel": float("inf"),
        "num_different": 2,
    }
    assert (seen["max_abs"], seen["max_rel"], seen["num_different"]) == (45.0, 0.9, 1)
    assert result["num_equal"] == 4


def test_largest_distances(tmp_path: Path) -> None:
    values = some_values()
    original = values["a.weight", "param"].clone()
    values["a.weight", "param"][2, 3] += 0.5
    values["a.weight", "param"][0, 0] += 0.25
    (difference,) = compare(tmp_path, values)["differences"]
    changed = values["a.weight", "param"]
    distance = (changed.double() - original.double()).abs()
    assert difference["max_abs"] == distance.max().item()
    assert difference["max_rel"] == (distance / torch.maximum(changed.abs(), original.abs()).double()).max().item()


def test_types_shapes_and_what_is_missing(tmp_path: Path) -> None:
    values = some_values()
    values["a.bias", "param"] = values["a.bias", "param"].float()
    values["scalar", "param"] = torch.zeros(1)
    values["more", "param"] = values.pop(("mask", "buffer"))
    values["a.weight", "exp_avg"] = values["a.weight", "exp_avg"].double() + 2
    found = {row["name"]: row for row in compare(tmp_path, values)["differences"]}
    assert found["a.bias"] == {"name": "a.bias", "key": "param", "what": "dtype", "a": "bfloat16", "b": "float32"}
    assert found["scalar"] == {"name": "scalar", "key": "param", "what": "shape", "a": [], "b": [1]}
    assert (found["mask"]["what"], found["more"]["what"]) == ("only in a", "only in b")
    assert (found["a.weight"]["what"], found["a.weight"]["b"]) == ("values", "float64")
    assert found["a.weight"]["max_abs"] == pytest.approx(2)


def test_bits_of_equal_values(tmp_path: Path) -> None:
    values = some_values()
    values["a.weight", "exp_avg"][:] = 0.0
    left = write_checkpoint(tmp_path / "a", values)
    values["a.weight", "exp_avg"][:] = -0.0
    right = write_checkpoint(tmp_path / "b", values)
    result = diff(Stored(left), Stored(right), weights_only=False, report=silent)
    assert result["differences"] == [{"name": "a.weight", "key": "exp_avg", "what": "bits"}]


def test_settings(tmp_path: Path) -> None:
    optimizer = {"class": "AdamW", "kind": "adam", "groups": {"decay": {"lr": 0.2, "eps": 1e-8}}}
    result = compare(tmp_path, some_values(), step=2, optimizer=optimizer)
    rows = [(row["name"], row["key"], row.get("a"), row.get("b")) for row in result["differences"]]
    assert rows == [("run", "step", 1, 2), ("group decay", "lr", 0.1, 0.2), ("group decay", "eps", None, 1e-8)]
    assert result["num_equal"] == 6


def test_weights_only(tmp_path: Path) -> None:
    values = some_values()
    values["a.weight", "exp_avg"] += 1
    result = compare(tmp_path, values, weights_only=True, step=9)
    assert result["differences"] == []
    assert result["num_tensors"] == 5


def test_damage_is_not_a_difference(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, some_values())
    data = path / "rank-00000.bin"
    data.write_bytes(b"\xff" + data.read_bytes()[1:])
    with pytest.raises(CheckpointError, match="checksum mismatch"):
        diff(Stored(path), Stored(path), weights_only=False, report=silent)
