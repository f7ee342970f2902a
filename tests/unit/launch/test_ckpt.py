import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from anyshard.configs.errors import CheckpointError
from anyshard.launch import ckpt

ASSET = Path(__file__).parents[2] / "assets" / "checkpoint_v1"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with one sound checkpoint and a newer one that is damaged."""
    shutil.copytree(ASSET / "step-00000003", tmp_path / "checkpoints" / "step-00000003")
    shutil.copytree(ASSET / "step-00000003", tmp_path / "checkpoints" / "step-00000004")
    return tmp_path


def test_ls(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ckpt.ls(run, as_json=True) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["step"], row["problem"] is None, row["layout"]) for row in rows] == [(4, False, ""), (3, True, "dp 2, ZeRO 1")]
    assert rows[1]["num_bytes"] > 60_000
    assert ckpt.ls(run) == 0
    text = capsys.readouterr().out
    assert "complete" in text
    assert "step 4: COMMIT: it is of step 3" in text


def test_ls_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ckpt.ls(tmp_path) == 1
    assert "no checkpoints" in capsys.readouterr().err
    assert ckpt.ls(tmp_path, as_json=True) == 1
    assert json.loads(capsys.readouterr().out) == []


def test_show(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ckpt.show(run, as_json=True) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["step"] == 3
    assert content["tensors"][0] == {"name": "linear.weight", "shape": [3, 5], "keys": ["param", "exp_avg", "exp_avg_sq"]}
    assert {"key": "exp_avg", "dtype": "float32", "tensors": 2, "numel": 18, "num_bytes": 72} in content["states"]
    assert ckpt.show(run / "checkpoints" / "step-00000003") == 0
    assert "linear.bias" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="no checkpoint"):
        ckpt.show(run / "nothing")


def test_verify(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ckpt.verify(run) == 0
    assert "every byte is as it was written" in capsys.readouterr().out
    assert ckpt.verify(run, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["damages"] == []
    data = run / "checkpoints" / "step-00000003" / "rank-00000.bin"
    data.write_bytes(b"\xff" + data.read_bytes()[1:])
    assert ckpt.verify(run) == 1
    assert "rank-00000.bin, bytes 0..32, linear.weight [param]: checksum mismatch" in capsys.readouterr().out
    assert ckpt.verify(run, as_json=True) == 1
    (damage,) = json.loads(capsys.readouterr().out)["damages"]
    assert (damage["file"], damage["offset"], damage["tensor"]) == ("rank-00000.bin", 0, "linear.weight [param]")


def test_no_torch_is_imported() -> None:
    code = "import sys, anyshard.launch.ckpt; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
