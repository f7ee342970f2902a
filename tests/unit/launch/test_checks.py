"""The checks of `anyshard doctor`, each on a machine that has the fault and on one that has not."""

from __future__ import annotations

import re
import resource
import socket
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from anyshard.launch import checks
from anyshard.launch.checks import Check
from anyshard.launch.env import Hardware
from anyshard.offload import op_cache
from anyshard.offload.op_cache import OPS, OpStatus

CPU = Hardware(num_gpus=0, gpu_name=None, gpu_memory_gib=None, host_memory_gib=16, num_cores=4)
GPU = Hardware(num_gpus=8, gpu_name="H100", gpu_memory_gib=80, host_memory_gib=1000, num_cores=96)
Usage = namedtuple("Usage", "total free")


def test_tested_versions_are_those_that_constraints_pin() -> None:
    file = Path(__file__).parents[3] / "constraints.txt"
    if not file.exists():
        pytest.skip("no checkout: constraints.txt is not part of the wheel")
    pins = dict(re.findall(r"^(\S+)==(\S+)$", file.read_text(), re.MULTILINE))
    assert {name: pins[name] for name in checks.TESTED} == checks.TESTED


def test_a_package_is_missing_out_of_range_untested_or_fine() -> None:
    found = pytest.__version__
    major = int(found.split(".")[0])
    assert checks._package("no-such-package-x", "1.0", Requirement("no-such-package-x>=1")).mark == "fail"
    out = checks._package("pytest", "99.0", Requirement("pytest>=99"))
    assert (out.mark, "needs >=99" in out.found, "pytest==99.0" in out.fix) == ("fail", True, True)
    assert checks._package("pytest", f"{major - 1}.0", Requirement("pytest>=1")).mark == "warn"
    assert checks._package("pytest", found, None).mark == "ok"
    assert {check.mark for check in checks.packages()} <= {"ok", "warn"}


def test_the_interpreter_is_named() -> None:
    assert sys.executable in checks.python_version().found


def test_a_processor_without_vector_instructions_is_a_warning(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name\t: Old One\nflags\t\t: fpu sse\n")
    old = checks.processor(CPU, cpuinfo)
    assert (old.mark, "Old One" in old.found) == ("warn", True)
    cpuinfo.write_text("model name\t: New One\nflags\t\t: fpu avx2 amx_bf16\n")
    new = checks.processor(CPU, cpuinfo)
    assert new == Check("processor", "ok", "New One, 4 cores, avx2 amx_bf16")


@pytest.mark.parametrize(("available_gib", "mark"), [(1, "warn"), (8, "ok")])
def test_memory(monkeypatch: pytest.MonkeyPatch, available_gib: int, mark: str) -> None:
    state = namedtuple("State", "available total")(available_gib * 2**30, 16 * 2**30)
    monkeypatch.setattr(checks.psutil, "virtual_memory", lambda: state)
    assert checks.memory().mark == mark


def test_a_driver_that_does_not_answer_is_a_failure_and_no_driver_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    def broken() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)

    monkeypatch.setattr(pynvml, "nvmlInit", broken)
    monkeypatch.setattr(checks.shutil, "which", lambda name: None)
    assert checks.gpus().mark == "ok"
    monkeypatch.setattr(checks.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert checks.gpus().mark == "fail"


def test_gpus_are_counted_by_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    answers = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: "580.1",
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetMemoryInfo": lambda handle: namedtuple("Info", "total")(80 * 2**30),
        "nvmlDeviceGetName": lambda handle: "H100",
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)
    assert checks.gpus() == Check("gpu", "ok", "2 x H100 (80 GiB); driver 580.1")


def test_operators_that_cannot_be_built_fail_only_where_every_run_needs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [OpStatus(op, "missing", "no compiler.", "install one") for op in OPS.values()]
    monkeypatch.setattr(op_cache, "status", lambda: entries)
    marks = {check.name: check.mark for check in checks.operators(CPU)}
    assert marks["operator shm_comm"] == "fail"
    assert marks["operator cpu_adam"] == "warn"
    assert {check.name: check.mark for check in checks.operators(GPU)}["operator shm_comm"] == "ok"
    monkeypatch.setattr(op_cache, "status", lambda: [OpStatus(OPS["cpu_adam"], "buildable")])
    assert "anyshard.offload.ops build cpu_adam" in checks.operators(CPU)[0].fix
    monkeypatch.setattr(op_cache, "status", lambda: [OpStatus(OPS["async_io"], "buildable")])
    assert checks.operators(CPU)[0].mark == "ok"


def test_stale_locks_are_removed_and_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert checks.build_locks().found == "none stale"
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    assert str(lock) in checks.build_locks().found
    assert not lock.exists()


def test_little_shared_memory_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert checks.shared_memory(tmp_path / "none").mark == "warn"
    monkeypatch.setattr(checks.psutil, "disk_usage", lambda path: Usage(2**26, 2**26))
    assert "--shm-size" in checks.shared_memory(tmp_path).fix
    monkeypatch.setattr(checks.psutil, "disk_usage", lambda path: Usage(2**33, 2**33))
    assert checks.shared_memory(tmp_path).mark == "ok"


def test_low_limits_are_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.resource, "getrlimit", lambda which: (1024, 1024))
    assert [check.mark for check in checks.limits()] == ["warn", "warn", "ok"]
    monkeypatch.setattr(checks.resource, "getrlimit", lambda which: (resource.RLIM_INFINITY,) * 2)
    assert {(check.mark, check.found) for check in checks.limits()} == {("ok", "unlimited")}


def test_a_directory_that_cannot_be_written_fails_and_a_full_one_warns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert checks.disk("run directory", tmp_path / "new" / "run", wanted_gib=0).mark == "ok"
    assert not (tmp_path / "new").exists()
    assert checks.disk("run directory", tmp_path, wanted_gib=1e9).mark == "warn"

    def refuse(dir: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checks.tempfile, "NamedTemporaryFile", refuse)
    refused = checks.disk("run directory", tmp_path)
    assert (refused.mark, "Permission denied" in refused.found) == ("fail", True)


def test_the_cache_directory_follows_its_variable() -> None:
    assert checks.cache_directory({"ANYSHARD_CACHE": "/big/disk"}) == Path("/big/disk")
    assert checks.cache_directory({}).name == "anyshard"


def test_wandb_login(tmp_path: Path) -> None:
    assert "offline by WANDB_MODE" in checks.wandb_login({"WANDB_MODE": "offline"}).found
    assert "WANDB_API_KEY" in checks.wandb_login({"WANDB_API_KEY": "x"}).found
    assert "no key" in checks.wandb_login({}, tmp_path).found
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password x\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert "key in" in checks.wandb_login({}, tmp_path).found
    (tmp_path / ".netrc").write_text("machines are great\n")
    broken = checks.wandb_login({}, tmp_path)
    assert (broken.mark, broken.fix) == ("warn", "mend it, or set WANDB_API_KEY")
    assert ".netrc cannot be read (bad toplevel token 'machines'" in broken.found


def test_hugging_face(tmp_path: Path) -> None:
    (tmp_path / "hub" / "models--gpt2").mkdir(parents=True)
    found = checks.hugging_face({"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}).found
    assert found == f"cache {tmp_path} (1 models), offline by HF_HUB_OFFLINE, no token"
    assert "with a token" in checks.hugging_face({"HF_HOME": str(tmp_path), "HF_TOKEN": "x"}).found


def test_a_taken_port_is_a_warning() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        assert checks.port(number).mark == "warn"
    assert checks.port(number).mark == "ok"
