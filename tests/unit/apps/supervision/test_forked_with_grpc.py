"""A process that serves over gRPC starts others without gRPC's threads coming back to life in between: one of those could abort."""

from __future__ import annotations

import subprocess
import sys

_SCRIPT = """
import os, subprocess
from antiphon.apps.supervision.directory_hosting import DirectoryHosting

host = DirectoryHosting(None)
read_end, write_end = os.pipe()
count = lambda: os.write(write_end, str(len(os.listdir("/proc/self/task"))).encode())
subprocess.Popen(["true"], preexec_fn=count).wait()
print(os.read(read_end, 8).decode())
host.close()
"""


def test_a_child_has_one_thread_before_it_becomes_another_program() -> None:
    done = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "1", done.stderr
