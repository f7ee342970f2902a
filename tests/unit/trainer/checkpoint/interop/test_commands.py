import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import empty_like, fragments_of, some_values, write_checkpoint
from helpers.interop import silent, small_model, values_of, write_model
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from anyshard.configs.errors import CheckpointError, ConfigError, DiskFullError
from anyshard.configs.places import place
from anyshard.trainer.checkpoint import catalog
from anyshard.trainer.checkpoint.interop.commands import COMMANDS, open_source
from anyshard.trainer.checkpoint.interop.source import Stored
from anyshard.trainer.checkpoint.reader import read_into

ASSET = Path(__file__).parents[4] / "assets" / "checkpoint_v1"


def run(command: str, *arguments: Any) -> dict[str, Any]:
    result = COMMANDS[command](*(str(each) if isinstance(each, Path) else each for each in arguments), report=silent)
    assert json.loads(json.dumps(result)) == result
    return result


def export(source: Path, out: Path, to: str, config: str | None = None) -> dict[str, Any]:
    return run("export", source, out, to, None, 2**30, config)


def test_where_there_is_nothing_to_open(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such folder"):
        open_source(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="there is no checkpoint here: give a run"):
        open_source(tmp_path)
    for name in ("../elsewhere", "gone", ""):
        (tmp_path / "latest").write_text(name)
        with pytest.raises(CheckpointError, match=r"latest: it names .*, and there is no such folder"):
            open_source(tmp_path)


def test_object_stores_are_read_and_not_written(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path, some_values(), world_size=2)
    url = f"memory://interop/{tmp_path.name}"
    there = place(url) / source.name
    for file in source.iterdir():
        (there / file.name).write_bytes(file.read_bytes())
    assert run("convert", url, tmp_path / "out", 1)["step"] == run("convert", source, tmp_path / "same", 1)["step"]
    assert run("diff", url, tmp_path / "out", False)["differences"] == []
    with pytest.raises(ConfigError, match="an object store cannot do that"):
        run("convert", source, f"{url}/out", None)
    with pytest.raises(ConfigError, match="Resume from it as it is"):
        run("import", url, tmp_path / "in", False, None)
    with pytest.raises(CheckpointError, match="From an object store only checkpoints of anyshard are read"):
        run("import", f"{url}/nothing", tmp_path / "in", False, None)


@pytest.mark.parametrize("num_files", [None, 1, 2, 5])
def test_convert(tmp_path: Path, num_files: int | None) -> None:
    source = write_checkpoint(tmp_path, some_values(), world_size=2)
    result = run("convert", source, tmp_path / "out", num_files)
    assert result["data_files"] == (num_files or 2)
    out = Stored(tmp_path / "out")
    assert catalog.verify(tmp_path / "out") == []
    assert run("diff", source, tmp_path / "out", False)["differences"] == []
    assert [manifest.meta for manifest in out.manifests] == (
        [{"rank": 0}, {"rank": 1}] if num_files in (None, 2) else [{}] * out.commit.world_size
    )
    assert any("random number generators of the 2 ranks" in note for note in result["notes"]) == (num_files in (1, 5))
    assert out.commit.meta == Stored(source).commit.meta
    assert out.record.scalars == Stored(source).record.scalars
    values = some_values()
    read = empty_like(values)
    read_into(tmp_path / "out", fragments_of(read), out.chunks, verify=True)
    assert all(torch.equal(read[key], values[key]) for key in values)


def test_convert_an_earlier_version(tmp_path: Path) -> None:
    run("convert", ASSET, tmp_path / "out", 1)
    assert run("diff", ASSET, tmp_path / "out", False)["differences"] == []


def test_the_name_of_another_step_is_refused(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path, some_values(), step=4)
    with pytest.raises(ConfigError, match=r"OUT=.*the name of another step's checkpoint; the source is of step 4"):
        run("convert", source, tmp_path / "out" / "step-00000005", None)
    run("convert", source, tmp_path / "out" / "step-00000004", None)
    assert catalog.list_checkpoints(tmp_path / "out")[0].problem is None


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral"])
@pytest.mark.parametrize("files", ["one", "several"])
def test_a_hugging_face_folder_comes_in(tmp_path: Path, family: str, files: str) -> None:
    model = small_model(family)
    model.save_pretrained(tmp_path / "hf", max_shard_size="50GB" if files == "one" else 50_000)
    result = run("import", tmp_path / "hf", tmp_path / "in", False, None)
    assert (result["from"], result["step"]) == ("hf", 0)
    ours = write_model(tmp_path, model)
    same = run("diff", ours, tmp_path / "in", True)
    assert same["differences"] == []
    assert same["num_equal"] == len(values_of(model, states=False))
    record = Stored(tmp_path / "in").record
    assert (record.optimizer, record.scalars) == ({"class": "none", "kind": "none", "groups": {}}, [])
    assert record.tied == Stored(ours).record.tied
    assert export(tmp_path / "in", tmp_path / "back", "hf")["step"] == 0
    assert run("diff", tmp_path / "hf", tmp_path / "back", False)["differences"] == []


def test_imports_that_are_refused(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "run", some_values())
    with pytest.raises(ConfigError, match="a checkpoint of anyshard already"):
        run("import", source, tmp_path / "in", False, None)
    small_model("llama").save_pretrained(tmp_path / "hf")
    with pytest.raises(ConfigError, match=r"--config=.*cannot be read"):
        run("import", tmp_path / "hf", tmp_path / "in", False, str(tmp_path / "nothing.json"))
    (tmp_path / "hf" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="holds no weights"):
        run("import", tmp_path / "hf", tmp_path / "in", False, None)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["hf", "run"]


def test_a_configuration_for_later(tmp_path: Path) -> None:
    model = small_model("llama")
    model.save_pretrained(tmp_path / "hf")
    run("import", tmp_path / "hf", tmp_path / "in", False, str(tmp_path / "hf" / "config.json"))
    stored = Stored(tmp_path / "in").record.meta["model"]["config"]
    assert stored == json.loads((tmp_path / "hf" / "config.json").read_text())


def test_universal_there_and_back(tmp_path: Path) -> None:
    model = small_model("qwen3")
    model.model.norm.weight.requires_grad_(False)
    source = write_model(tmp_path, model)
    result = export(source, tmp_path / "out", "universal")
    assert (tmp_path / "out" / "latest_universal").read_text() == result["tag"] == "global_step5_universal"
    assert any("1 are in 'module'" in note for note in result["notes"])
    run("import", tmp_path / "out", tmp_path / "in", False, None)
    differences = run("diff", source, tmp_path / "in", False)["differences"]
    assert {(row["name"], row["what"]) for row in differences} == {("group decay", "setting")}


def test_universal_is_for_adam(tmp_path: Path) -> None:
    source = write_model(tmp_path, small_model("llama"), optimizer={"class": "Lion", "kind": "lion", "groups": {}})
    with pytest.raises(CheckpointError, match="the state of Lion, and DeepSpeed's universal format takes that of Adam"):
        export(source, tmp_path / "out", "universal")
    assert not (tmp_path / "out").exists()


def test_a_name_that_leads_elsewhere_is_no_folder(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "run", {("../../up", "param"): torch.ones(3)})
    with pytest.raises(CheckpointError, match=r"'../../up' cannot be the name of a folder"):
        export(source, tmp_path / "out", "universal")
    assert [each.name for each in tmp_path.iterdir()] == ["run"]


def test_dcp(tmp_path: Path) -> None:
    model = small_model("qwen3")
    source = write_model(tmp_path, model)
    export(source, tmp_path / "out", "dcp")
    dcp_to_torch_save(tmp_path / "out", tmp_path / "all.pt")
    content = torch.load(tmp_path / "all.pt", weights_only=True)
    assert set(content) == {"model", "optim"}
    values = values_of(model)
    for (name, key), value in values.items():
        held = content["model"][name] if key in ("param", "buffer") else content["optim"]["state"][name][key]
        assert torch.equal(held, value)
    assert len(content["model"]) == sum(key in ("param", "buffer") for _, key in values)
    assert {float(state["step"]) for state in content["optim"]["state"].values()} == {5.0}
    assert not (tmp_path / "out" / "LEASE").exists()


def test_dcp_leaves_out_what_only_one_layout_can_read(tmp_path: Path) -> None:
    name = "@partition-" + "0" * 32
    source = write_checkpoint(tmp_path / "run", {("w", "param"): torch.ones(3), (name, "absmax1"): torch.ones(2)})
    result = export(source, tmp_path / "out", "dcp")
    assert any("states of 1 partitions are left out" in note for note in result["notes"])
    dcp_to_torch_save(tmp_path / "out", tmp_path / "all.pt")
    content = torch.load(tmp_path / "all.pt", weights_only=True)
    assert set(content["model"]) == {"w"}
    assert name not in content.get("optim", {}).get("state", {})


@pytest.mark.parametrize("to", ["universal", "dcp"])
def test_damage_leaves_nothing(tmp_path: Path, to: str) -> None:
    source = write_model(tmp_path / "run", small_model("llama"))
    data = source / "rank-00001.bin"
    data.write_bytes(data.read_bytes()[:-4096] + bytes(4096))
    with pytest.raises(CheckpointError, match="checksum mismatch"):
        export(source, tmp_path / "out", to)
    with pytest.raises(CheckpointError, match="checksum mismatch"):
        run("convert", source, tmp_path / "out", None)
    assert [each.name for each in tmp_path.iterdir()] == ["run"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB, where this machine lets us mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or os.system(f"mount -t tmpfs -o size=256k tmpfs {disk} 2>/dev/null"):
        pytest.skip("no tmpfs can be mounted here")
    yield disk
    os.system(f"umount {disk}")


@pytest.mark.parametrize("to", ["hf", "universal", "dcp", "ours"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, small_disk: Path, to: str) -> None:
    source = write_model(tmp_path / "run", small_model("llama"))
    with pytest.raises(DiskFullError, match="No space left on device") as caught:
        run("convert", source, small_disk / "out", None) if to == "ours" else export(source, small_disk / "out", to)
    assert caught.value.exit_code == 3
    assert list(small_disk.iterdir()) == []
