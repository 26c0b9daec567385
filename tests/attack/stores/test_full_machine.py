"""A machine that has no shared memory left, or allows few files: what is served goes on, or says by name what it lacks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(280)]

TESTS = Path(__file__).parents[2]
EXAMPLE = TESTS.parent / "deploy/examples/smollm2-afd.yaml"

# In a mount namespace of its own, so that nobody else's shared memory is filled.
SERVED = """
import errno, json, pathlib, subprocess, sys
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", "/dev/shm"], check=True)

def fill():
    with open("/dev/shm/full", "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError as error:
            assert error.errno == errno.ENOSPC

fill()
from antiphon.core.ids import Role
from attack.conftest import Target
target = Target(pathlib.Path(sys.argv[1]))
try:
    before = target.expected
    pathlib.Path("/dev/shm/full").unlink()
    assert target.ask() == before
    fill()
    for _ in range(3):
        assert target.ask() == before
    target.check_unharmed()
    print(json.dumps({"data": sorted({each.partition("://")[0] for each in target.workers[Role.FFN].endpoint.data.split(",")})}))
finally:
    target.close()
"""


def test_a_full_dev_shm_stops_nothing_at_the_start_and_nothing_in_service(tmp_path: Path) -> None:
    """Links are anonymous memory of the kernel's own, which that file system's size does not bound."""
    if subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("a mount namespace of one's own needs root")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    command = ["unshare", "-m", sys.executable, "-c", SERVED, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=260, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "shm" in done.stdout


def test_too_few_files_are_said_by_name_before_anything_starts() -> None:
    """Under `ulimit -n 256`, hard: what may be raised is raised."""
    serve = f"ulimit -n 256; exec {sys.executable} -m antiphon serve -f {EXAMPLE} --http-port 0 --grpc-port 0"
    done = subprocess.run(["bash", "-c", serve], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert "256 open files are allowed, 1024 are needed: ulimit -n 1024" in done.stderr + done.stdout
