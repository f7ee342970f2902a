"""How `anyshard doctor` sums up: the exit code, JSON, and what children report."""

from __future__ import annotations

import json

import pytest

from anyshard.launch import doctor as module
from anyshard.launch.checks import Check
from anyshard.launch.doctor import collective_result, doctor, torch_check
from anyshard.launch.env import Hardware

CPU = Hardware(num_gpus=0, gpu_name=None, gpu_memory_gib=None, host_memory_gib=16, num_cores=4)
GPU = Hardware(num_gpus=8, gpu_name="H100", gpu_memory_gib=80, host_memory_gib=1000, num_cores=96)
REPORT = {"torch": "2.13.0", "cuda": None, "num_devices": 0, "num_threads": 1}


@pytest.mark.parametrize(
    ("report", "hardware", "mark"),
    [
        (REPORT, CPU, "ok"),
        (REPORT, GPU, "fail"),
        ({**REPORT, "cuda": "13.0"}, GPU, "fail"),
        ({**REPORT, "cuda": "13.0", "num_devices": 8}, GPU, "ok"),
        ({"error": "ImportError: libtorch.so"}, CPU, "fail"),
    ],
)
def test_torch_must_start_and_see_the_gpus(report: dict[str, object], hardware: Hardware, mark: str) -> None:
    check = torch_check(report, hardware)
    assert check.mark == mark
    assert bool(check.fix) == (mark == "fail")


def test_a_failed_collective_is_a_failure() -> None:
    assert collective_result({"error": "no answer within 300 s"}, 4).mark == "fail"
    measured = {"backend": "gloo", "world_size": 4, "latency_us": 123.4, "bus_gb_per_s": 1.5}
    assert collective_result(measured, 4) == Check(
        "all-reduce on 4 ranks", "ok", "gloo: 123 us for 8 bytes, 1.50 GB/s bus bandwidth at 64 MiB"
    )


@pytest.mark.parametrize(("mark", "code"), [("ok", 0), ("warn", 0), ("fail", 3)])
def test_the_exit_code_is_3_only_when_something_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mark: str, code: int
) -> None:
    monkeypatch.setattr(module, "_start", lambda command, hardware: None)
    monkeypatch.setattr(module, "_finish", lambda process, timeout_s: REPORT)
    monkeypatch.setattr(module, "find_hardware", lambda: CPU)
    monkeypatch.setattr(module, "_local_checks", lambda hardware: [Check("a", "ok", "x"), Check("b", mark, "y", "do z")] * 2)
    assert doctor(as_json=True) == code
    shown = json.loads(capsys.readouterr().out)
    assert shown["ok"] == (code == 0)
    assert len(shown["checks"]) == 5
    assert doctor() == code
    text = capsys.readouterr().out
    assert f"[{mark:4}] b: y\n       -> do z\n" in text
    assert "[ok  ] torch devices: CPU build" in text
