from __future__ import annotations

from pathlib import Path

import pytest

from anyshard.configs.errors import ConfigError
from anyshard.configs.sources import CONFIG_DIR_ENV, OURS, config_dirs, find_file, group_choices, read_yaml, set_by


def _write(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def test_our_folder_comes_first_and_none_comes_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.setenv(CONFIG_DIR_ENV, str(other))
    assert config_dirs(tmp_path, [f"file://{tmp_path}", str(other)]) == [OURS, tmp_path.resolve(), other.resolve()]


def test_a_package_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path, "their_package/settings/__init__.py", "")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert config_dirs(None, ["pkg://their_package.settings"])[1] == (tmp_path / "their_package/settings").resolve()


@pytest.mark.parametrize("entry", ["/nowhere", "file:///nowhere", "pkg://nobody.configs", "pkg://os"])
def test_a_folder_that_is_not_there_is_refused(entry: str) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        config_dirs(None, [entry])


def test_all_missing_folders_are_told() -> None:
    with pytest.raises(ConfigError) as caught:
        config_dirs("/nowhere", ["/neither"])
    assert [problem.key for problem in caught.value.problems] == ["--config-dir", "hydra.searchpath"]


def test_a_file_that_ours_would_hide_is_refused(tmp_path: Path) -> None:
    _write(tmp_path, "zero/z3.yaml", "stage: 3")
    with pytest.raises(ConfigError, match=r"zero/z3.yaml has the name of a file in .*Rename yours"):
        config_dirs(tmp_path, [])


def test_choices_of_all_folders(tmp_path: Path) -> None:
    _write(tmp_path, "zero/mine.yaml", "stage: 3")
    _write(tmp_path, "model/family/small.yaml", "name: small")
    choices = group_choices([OURS, tmp_path])
    assert choices["zero"] == ["mine", "z0", "z1", "z2", "z3"]
    assert "family/small" in choices["model"]
    assert choices["model/family"] == ["small"]


def test_keys_that_a_file_sets(tmp_path: Path) -> None:
    file = _write(tmp_path, "a.yaml", "defaults: [x]\nstage: 3\nmore: {a: 1}\n")
    assert set_by(file, "zero") == {"zero.stage": 3, "zero.more.a": 1}
    assert set_by(_write(tmp_path, "b.yaml", ""), "zero") == {}
    assert read_yaml(_write(tmp_path, "c.yaml", "- 1")) == {}


def test_find_file() -> None:
    assert find_file([OURS], "zero/z1") == OURS / "zero/z1.yaml"
    assert find_file([OURS], "zero/z9") is None
