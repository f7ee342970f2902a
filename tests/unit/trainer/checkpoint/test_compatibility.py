"""Checkpoints of every released format version stay readable (tests/helpers/checkpoint_fixture.py made them)."""

import json
from pathlib import Path

import pytest
import torch

from anyshard.trainer.checkpoint.catalog import index_chunks, list_checkpoints, read_commit, read_manifests, verify
from anyshard.trainer.checkpoint.layout import Fragment
from anyshard.trainer.checkpoint.reader import read_into

ASSETS = Path(__file__).parents[3] / "assets"


@pytest.mark.parametrize("version", [1])
def test_a_stored_checkpoint_is_read(version: int) -> None:
    root = ASSETS / f"checkpoint_v{version}"
    expected = json.loads((root / "expected.json").read_text())
    (found,) = list_checkpoints(root)
    assert found.problem is None
    assert verify(found.path) == []
    commit = read_commit(found.path)
    assert (commit.step, commit.world_size, commit.meta) == (3, 2, {"tokens": 15})
    assert commit.optimizer["groups"]["no_decay"]["weight_decay"] == 0.0
    manifests = read_manifests(found.path, commit)
    assert [manifest.meta for manifest in manifests] == [{"rank": 0}, {"rank": 1}]
    assert {(s.key, s.kind, s.value, s.names) for m in manifests for s in m.scalars if "linear.weight" in s.names} == {
        ("step", "float32", 3.0, ("linear.weight", "linear.bias"))
    }
    index = index_chunks(manifests)
    assert set(index) == {(name, key) for name, states in expected.items() for key in states}
    for (name, key), chunks in index.items():
        tensor = chunks[0].tensor
        value = torch.zeros(tensor.shape, dtype=getattr(torch, tensor.dtype))
        read_into(found.path, [Fragment(tensor, 0, value.view(-1), False)], index, verify=True)
        assert value.tolist() == expected[name][key], (name, key)
