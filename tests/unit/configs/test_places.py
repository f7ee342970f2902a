"""Names of folders: which are of this machine."""

import sys
from pathlib import Path

import pytest

from anyshard.configs.errors import EnvError
from anyshard.configs.places import as_env_error, is_remote, place


@pytest.mark.parametrize("name", ["runs/x", "/a/b", "C:", "a:b", "x/s3://y", "file:///a/b"])
def test_of_this_machine(name: str) -> None:
    assert not is_remote(name)
    assert isinstance(place(name), Path)


def test_a_url_of_a_file_is_its_path() -> None:
    assert place("file:///a/b") == place("local:/a/b") == Path("/a/b")


@pytest.mark.parametrize("name", ["s3://bucket/run", Path("s3://bucket/run")])
def test_of_an_object_store(name: str | Path) -> None:
    """Also where pathlib took a slash away."""
    assert is_remote(name)
    assert str(place(name)) == "s3://bucket/run"
    assert place(place(name)) == place(name)


def test_a_kind_of_storage_that_is_not_known() -> None:
    with pytest.raises(EnvError, match="needs a library that is not here"):
        place("xyzzy://bucket/run")


def test_the_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "upath", None)
    with pytest.raises(EnvError, match=r"install anyshard\[s3\]"):
        place("s3://bucket/run")


def test_what_the_library_could_not_do() -> None:
    from botocore.exceptions import EndpointConnectionError

    told = as_env_error(EndpointConnectionError(endpoint_url="http://x"))
    assert told is not None
    assert 'Could not connect to the endpoint URL: "http://x"' in str(told)
    assert as_env_error(ValueError("x")) is None
