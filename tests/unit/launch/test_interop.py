import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from anyshard.configs.errors import ConfigError
from anyshard.launch import interop

ASSET = Path(__file__).parents[2] / "assets" / "checkpoint_v1"
EXPORT = {"to": "hf", "dtype": None, "max_shard_size": "5GB", "config": None, "as_json": False}


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("500MiB", 500 * 2**20), ("1.5 kb", 1500), ("77", 77), ("2T", 2 * 10**12), ("8b", 8)]
)
def test_sizes(text: str, size: int) -> None:
    assert interop.size_bytes(text) == size


@pytest.mark.parametrize("text", ["", "big", "-5GB", "5XB", "0", "IB", "3IB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="--max-shard-size="):
        interop.size_bytes(text)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"to": "onnx"}, "--to=onnx: there is no such format. Choose one of hf, universal, dcp"),
        ({"dtype": "int4"}, "--dtype=int4: there is no such type"),
        ({"to": "dcp", "dtype": "bf16"}, "--dtype=bf16: --to dcp keeps every state as it is stored"),
        ({"max_shard_size": "much"}, "--max-shard-size=much"),
        ({}, "OUT=.*not empty"),
    ],
)
def test_wrong_options(tmp_path: Path, options: dict[str, str], reason: str) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(ConfigError, match=reason):
        interop.export(ASSET, tmp_path, **{**EXPORT, **options})


def test_diff(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert interop.diff(ASSET, ASSET / "step-00000003", weights_only=False, as_json=False) == 0
    assert "the same: 8 of 8 tensors are equal bit for bit" in capsys.readouterr().out
    assert interop.diff(ASSET, ASSET, weights_only=True, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["num_tensors"] == 4


def test_differences_are_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"name": "w", "key": "param", "what": "values", "max_abs": 0.125, "max_rel": 0.5, "num_different": 1234}
    rows = [values, *({"name": f"t{n}", "key": "param", "what": "shape", "a": [n], "b": [n + 1]} for n in range(50))]
    result = {"a": "x", "b": "y", "num_tensors": 60, "num_equal": 9, "differences": rows}
    monkeypatch.setattr(interop, "call", lambda *args, **options: result)
    monkeypatch.setenv("COLUMNS", "160")
    assert interop.diff(Path("x"), Path("y"), weights_only=False, as_json=False) == 1
    text = capsys.readouterr().out
    for part in ("0.125", "1,234", "[38]", "and 11 more", "51 differences: 9 of 60 tensors are equal bit for bit"):
        assert part in text
    assert interop.diff(Path("x"), Path("y"), weights_only=False, as_json=True) == 1
    assert json.loads(capsys.readouterr().out) == result


def test_no_torch_is_imported() -> None:
    code = "import sys, anyshard.launch.interop; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_asset_is_not_of_a_hugging_face_model(tmp_path: Path) -> None:
    run = shutil.copytree(ASSET, tmp_path / "run")
    with pytest.raises(ConfigError, match="use --to dcp"):
        interop.export(run, tmp_path / "out", **EXPORT)
    assert not (tmp_path / "out").exists()


def test_import_and_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def call(label: str, request: dict[str, object], *, show_progress: bool) -> dict[str, object]:
        asked.append(request)
        return {"out": "there", "step": 3, "notes": ["one thing was left"]}

    monkeypatch.setattr(interop, "call", call)
    out = tmp_path / "out"
    assert interop.import_(Path("a"), out, weights_only=True, config=Path("c.json"), as_json=False) == 0
    text = capsys.readouterr().out
    assert text.splitlines() == [
        "there: step 3",
        "  note: one thing was left",
        f"  note: continue from it: anyshard train ... resume={out}",
    ]
    assert interop.convert(Path("a"), out, num_files=2, as_json=True) == 0
    assert json.loads(capsys.readouterr().out) == {"out": "there", "step": 3, "notes": ["one thing was left"]}
    common = {"source": "a", "out": str(out)}
    assert asked == [
        {"command": "import", **common, "weights_only": True, "config": "c.json"},
        {"command": "convert", **common, "num_files": 2},
    ]
    for occupied in (
        lambda: interop.import_(Path("a"), ASSET, weights_only=False, config=None, as_json=False),
        lambda: interop.convert(Path("a"), ASSET, num_files=None, as_json=False),
    ):
        with pytest.raises(ConfigError, match=r"OUT=.*not empty"):
            occupied()
