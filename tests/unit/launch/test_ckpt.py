import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.checkpoints import some_values, write_checkpoint

from anyshard.configs.errors import CheckpointError, EnvError
from anyshard.launch import ckpt
from anyshard.trainer.checkpoint import ram
from anyshard.trainer.checkpoint.catalog import checkpoint_name, list_checkpoints
from anyshard.trainer.checkpoint.retention import make_temporary

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


@pytest.mark.parametrize(("name", "problem"), [("step-00000003", False), ("step-00000004", True), ("imported", False)])
def test_ls_of_one(name: str, problem: bool, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "imported":
        shutil.copytree(ASSET / "step-00000003", run / "checkpoints" / name)
    assert ckpt.ls(run / "checkpoints" / name, as_json=True) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["path"], row["step"]) == (str(run / "checkpoints" / name), 4 if problem else 3)
    assert bool(row["problem"]) == problem


def test_ls_of_one_that_cannot_be_read(run: Path) -> None:
    broken = run / "imported"
    shutil.copytree(ASSET / "step-00000003", broken)
    (broken / "COMMIT").write_text("{")
    with pytest.raises(CheckpointError, match="COMMIT"):
        ckpt.ls(broken)


def test_ls_tells_what_is_in_shared_memory(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = ram.folder_of(run)
    ram.make(folder)
    try:
        write_checkpoint(folder, some_values(), step=7)
        assert ckpt.ls(run, as_json=True) == 0
        rows = json.loads(capsys.readouterr().out)
        assert [(row["step"], row["in_memory"]) for row in rows] == [(7, True), (4, False), (3, False)]
        assert ckpt.ls(run) == 0
        assert "complete, in shared" in capsys.readouterr().out
    finally:
        ram.discard(folder)


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


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    """A run with checkpoints of the steps 1 to 6; 6 has a damaged byte, 2 lacks a file."""
    for step in range(1, 7):
        write_checkpoint(tmp_path / "checkpoints", some_values(), step=step)
    data = tmp_path / "checkpoints" / checkpoint_name(6) / "rank-00000.bin"
    data.write_bytes(b"\xff" + data.read_bytes()[1:])
    (tmp_path / "checkpoints" / checkpoint_name(2) / "rank-00001.bin").unlink()
    return tmp_path


def steps_of(run: Path) -> list[int]:
    return sorted(found.step for found in list_checkpoints(run / "checkpoints"))


def test_prune(pruned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ckpt.prune(pruned, keep=2, keep_every=3, dry_run=True) == 0
    text = capsys.readouterr().out
    assert "step-00000006: stays (damaged: rank-00000.bin, bytes 0..64" in text
    for step, fate in ((5, "stays"), (4, "stays"), (3, "stays"), (2, "would go (damaged"), (1, "would go")):
        assert f"step-0000000{step}: {fate}" in text
    assert steps_of(pruned) == [1, 2, 3, 4, 5, 6]
    assert ckpt.prune(pruned, keep=2, keep_every=3, as_json=True) == 0
    result = json.loads(capsys.readouterr().out)
    assert [Path(path).name[-1] for path in result["removed"]] == ["2", "1"]
    assert [Path(path).name[-1] for path in result["kept"]] == ["6", "5", "4", "3"]
    assert len(result["problems"]) == 2
    assert steps_of(pruned) == [3, 4, 5, 6]
    assert ckpt.prune(pruned / "checkpoints", keep=1) == 0
    assert "step-00000004: removed" in capsys.readouterr().out
    assert steps_of(pruned) == [5, 6]
    assert sorted(path.name for path in (pruned / "checkpoints").iterdir()) == [checkpoint_name(5), checkpoint_name(6)]


def test_prune_does_not_count_what_is_damaged(pruned: Path) -> None:
    for step in (3, 4, 5):
        data = pruned / "checkpoints" / checkpoint_name(step) / "rank-00001.bin"
        data.write_bytes(data.read_bytes()[:-1] + b"\xff")
    assert ckpt.prune(pruned, keep=1) == 0
    assert steps_of(pruned) == [1, 2, 3, 4, 5, 6]


def test_prune_without_a_good_one(pruned: Path, tmp_path: Path) -> None:
    for step in (1, 3, 4, 5):
        (pruned / "checkpoints" / checkpoint_name(step) / "COMMIT").unlink()
    with pytest.raises(CheckpointError, match="no good checkpoint, so nothing may go"):
        ckpt.prune(pruned, keep=1)
    assert steps_of(pruned) == [1, 2, 3, 4, 5, 6]
    with pytest.raises(CheckpointError, match="no good checkpoint"):
        ckpt.prune(tmp_path / "nothing", keep=1)


def test_prune_while_a_save_is_going_on(pruned: Path) -> None:
    make_temporary(pruned / "checkpoints", checkpoint_name(7))
    with pytest.raises(CheckpointError, match=r"step-00000007\.tmp-.* is being written"):
        ckpt.prune(pruned, keep=1)
    assert steps_of(pruned) == [1, 2, 3, 4, 5, 6]


def test_prune_what_cannot_be_removed(pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("anyshard.trainer.checkpoint.retention.remove", refuse)
    with pytest.raises(EnvError, match="step-00000004: cannot be removed"):
        ckpt.prune(pruned, keep=1)


def test_no_torch_is_imported() -> None:
    code = "import sys, anyshard.launch.ckpt; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
