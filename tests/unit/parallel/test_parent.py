"""A process that is to end with its parent does, however the parent ends."""

from __future__ import annotations

import signal
import subprocess
import sys

import psutil
import pytest

CHILD = """
import os, signal, sys, time
from anyshard.parallel.parent import signal_when_parent_dies
signal.signal(signal.SIGTERM, lambda *_: (print("told", flush=True), os._exit(0)))
signal_when_parent_dies(signal.SIGTERM, int(sys.argv[1]) if len(sys.argv) > 1 else None)
print(os.getpid(), flush=True)
time.sleep(60)
"""
PARENT = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1]])
time.sleep(60)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's help is Linux's own")
def test_the_child_of_a_killed_parent_is_told():
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert parent.stdout.read() == "told\n"
    psutil.wait_procs([child], timeout=20)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's help is Linux's own")
def test_a_parent_that_is_gone_already_is_noticed():
    child = subprocess.run([sys.executable, "-c", CHILD, "1"], capture_output=True, text=True, timeout=30, check=False)
    assert child.stdout == "told\n"
