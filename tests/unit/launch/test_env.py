import socket
import subprocess
import sys

import pynvml
import pytest

from anyshard.launch import env


@pytest.fixture(autouse=True)
def fresh():
    env.find_hardware.cache_clear()
    yield
    env.find_hardware.cache_clear()


def test_a_host_without_driver_has_no_gpus(monkeypatch):
    def no_driver():
        raise pynvml.NVMLError_LibraryNotFound

    monkeypatch.setattr(pynvml, "nvmlInit", no_driver)
    hardware = env.find_hardware()
    assert (hardware.num_gpus, hardware.gpu_name, hardware.gpu_memory_gib) == (0, None, None)
    assert hardware.num_cores >= 1
    assert hardware.host_memory_gib > 0.5


@pytest.mark.parametrize(
    ("visible", "count"),
    [(None, 4), ("0,2", 2), ("", 0), ("-1", 0), ("1,-1,2", 1), ("7", 0), ("GPU-8f1c,GPU-77aa", 2)],
)
def test_visible_gpus_are_counted(monkeypatch, visible, count):
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 4)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda i: i)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", lambda handle: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda handle: type("Info", (), {"total": 80 * 2**30}))
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    hardware = env.find_hardware()
    assert hardware.num_gpus == count
    assert hardware.gpu_memory_gib == (80 if count else None)


def test_a_port_in_use_is_not_free():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        assert not env.is_port_free(port)
    assert env.is_port_free(port)


def test_nothing_of_the_command_line_imports_torch():
    code = """
import sys, pkgutil, importlib, anyshard.launch, anyshard.configs
for package in (anyshard.launch, anyshard.configs):
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + '.'):
        importlib.import_module(module.name)
assert not {'torch', 'deepspeed', 'transformers'} & set(sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_control_group_bounds_the_memory(tmp_path):
    proc, root = tmp_path / "cgroup", tmp_path / "sys"
    proc.write_text("9:name=systemd:/\n4:memory:/jobs/a\n0::/user/b\n")
    for folder, name, limit in (
        ("memory/jobs/a", "memory.limit_in_bytes", str(2**63 - 4096)),
        ("memory/jobs", "memory.limit_in_bytes", "3000"),
        ("user/b", "memory.max", "max"),
        ("user", "memory.max", "5000"),
    ):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / name).write_text(limit)
    assert env.memory_limit_bytes(proc, root) == 3000
    (root / "memory/jobs/memory.limit_in_bytes").unlink()
    assert env.memory_limit_bytes(proc, root) == 5000
    (root / "user/memory.max").unlink()
    assert env.memory_limit_bytes(proc, root) is None
    assert env.memory_limit_bytes(tmp_path / "none", root) is None
