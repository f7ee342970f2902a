"""The probe on this machine: rates through DeepSpeed's own I/O, kept for plans and runs."""

from __future__ import annotations

import pytest
from helpers.ranks import run_ranks

from anyshard.launch.doctor import probe_result
from anyshard.offload.derive import MIB, Aio

pytestmark = pytest.mark.dist


def _probe(drive, cache):
    import dataclasses
    import os
    from pathlib import Path

    from anyshard.offload import measured, probe

    os.environ["ANYSHARD_CACHE"] = cache
    whole = probe.FILE_BYTES, probe.CANDIDATES
    probe.FILE_BYTES, probe.CANDIDATES = 8 * MIB, [Aio(MIB // 4, 8, 1), Aio(MIB, 8, 2)]
    said = []
    try:
        rates = probe.probe(Path(drive), said.append)
    finally:
        probe.FILE_BYTES, probe.CANDIDATES = whole
    file = measured.store(Path(drive), rates)
    assert measured.load(Path(drive)) == rates
    return {"file": str(file), **dataclasses.asdict(rates)}, said


def test_a_probe_of_this_machine(tmp_path):
    ((report, said),) = run_ranks(_probe, 1, drive=str(tmp_path), cache=str(tmp_path / "cache"))
    rates = {name: value for name, value in report.items() if name.endswith("_per_s") and "device" not in name}
    assert all(value > 1e6 for value in rates.values()), rates
    assert report["measured"]
    assert len([line for line in said if "GB/s" in line]) == 2
    assert not list((tmp_path / "anyshard-swap").iterdir())
    check = probe_result(report, tmp_path)
    assert check.mark == "ok"
    assert "kept in" in check.found


def test_a_probe_that_failed_says_where_to_read():
    check = probe_result({"error": "no drive"}, "/mnt")
    assert (check.mark, check.found) == ("fail", "no drive")
    assert "docs/offload.md" in check.fix
