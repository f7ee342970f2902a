"""What a probe found is kept per host and device, and anything else is a data sheet."""

from __future__ import annotations

import pytest

from anyshard.offload import measured
from anyshard.offload.derive import Aio
from anyshard.offload.measured import Rates, cache_file, load, store


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("ANYSHARD_CACHE", str(tmp_path / "cache"))


def test_what_is_stored_is_loaded_for_every_folder_of_the_device(tmp_path):
    rates = Rates(read_bytes_per_s=3e9, measured=True, aio=Aio(2**18, 32, 2))
    store(tmp_path, rates)
    assert load(tmp_path / "not" / "there" / "yet") == rates


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 0}', '{"format": 1, "aio": {"block_bytes": 9999999999}}'])
def test_anything_else_is_as_if_nothing_was_measured(tmp_path, text):
    file = cache_file(tmp_path)
    file.parent.mkdir(parents=True)
    file.write_text(text)
    assert load(tmp_path) == Rates()
    assert not load(tmp_path).measured


def test_hosts_do_not_share_a_result(monkeypatch, tmp_path):
    one = cache_file(tmp_path)
    monkeypatch.setattr(measured.socket, "gethostname", lambda: "elsewhere")
    assert cache_file(tmp_path) != one
