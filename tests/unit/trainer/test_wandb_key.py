"""One answer to where wandb's key is, the same that wandb itself gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from anyshard.trainer.wandb_key import KeySearch, find_key

KEY = "k" * 40


def write(file: Path, host: str = "api.wandb.ai", password: str = KEY) -> Path:
    file.write_text(f"machine {host} login user password {password}\n")
    file.chmod(0o600)
    return file


def test_there_is_none(tmp_path: Path) -> None:
    assert find_key({}, tmp_path) == KeySearch()


def test_the_environment_comes_first(tmp_path: Path) -> None:
    write(tmp_path / ".netrc")
    assert find_key({"WANDB_API_KEY": KEY}, tmp_path) == KeySearch("WANDB_API_KEY")
    assert find_key({"WANDB_API_KEY": ""}, tmp_path) == KeySearch(str(tmp_path / ".netrc"))


@pytest.mark.parametrize("name", [".netrc", "_netrc"])
def test_a_file_in_the_home_directory(name: str, tmp_path: Path) -> None:
    assert find_key({}, tmp_path) == KeySearch()
    file = write(tmp_path / name)
    assert find_key({}, tmp_path) == KeySearch(str(file))
    assert find_key({"NETRC": str(tmp_path / "another")}, tmp_path) == KeySearch()


def test_only_the_host_that_runs_are_sent_to_counts(tmp_path: Path) -> None:
    write(tmp_path / ".netrc", host="wandb.example.org")
    assert find_key({}, tmp_path) == KeySearch()
    assert find_key({"WANDB_BASE_URL": "https://wandb.example.org"}, tmp_path).source == str(tmp_path / ".netrc")


@pytest.mark.parametrize("content", [b"machines are great\n", b"\xff\xfe\n"])
def test_a_file_that_cannot_be_read_has_no_key_and_says_why(content: bytes, tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_bytes(content)
    found = find_key({}, tmp_path)
    assert found.source is None
    assert str(found.problem).startswith(f"{tmp_path}/.netrc cannot be read (")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    assert find_key({"NETRC": str(tmp_path)}).problem == f"{tmp_path} cannot be read (Is a directory)"


@pytest.mark.parametrize(
    ("host", "url"), [("api.wandb.ai", None), ("wandb.example.org", None), ("a.example.org", "https://a.example.org")]
)
def test_wandb_finds_the_same(host: str, url: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wandb.sdk.lib.wbauth import wbnetrc

    file = write(tmp_path / "netrc", host=host)
    monkeypatch.setenv("NETRC", str(file))
    theirs = wbnetrc.read_netrc_auth(host=url or "https://api.wandb.ai")
    ours = find_key({"NETRC": str(file), **({"WANDB_BASE_URL": url} if url else {})})
    assert (ours.source is not None) == (theirs is not None)
