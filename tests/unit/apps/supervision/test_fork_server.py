"""Workers made by a fork server: what they are given, how their end is known, and on whose life theirs hangs."""

import os
import select
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from antiphon.apps.supervision import fork_server
from antiphon.apps.supervision.fork_server import ForkServer
from antiphon.apps.supervision.forked_process import ForkedProcess
from antiphon.core.errors import Unavailable

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="fork servers are for Linux")

DEADLINE_S = 30.0
HERE = str(Path(__file__).parent)


def a_server(run_dir: Path, **environment: str) -> ForkServer:
    found = ForkServer.start(run_dir, {"PYTHONPATH": os.pathsep.join([HERE, *sys.path]), **environment}, ("forked_standin",))
    assert found is not None
    return found


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ForkServer]:
    with a_server(tmp_path) as server:
        yield server


class Worker:
    """A forked process with its log and event pipe."""

    def __init__(self, address: str, log: Path, **environment: str) -> None:
        self.log = log
        self.events, events = os.pipe()
        with log.open("ab") as file:
            try:
                self.process = ForkedProcess(
                    address, {**os.environ, **environment}, log=file.fileno(), events=events, timeout_s=DEADLINE_S
                )
            finally:
                os.close(events)

    def ready(self) -> "Worker":
        assert select.select([self.events], [], [], DEADLINE_S)[0]
        assert os.read(self.events, 100) == b'{"event": "ready"}\n'
        return self


def gone(pid: int) -> bool:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.01)
    return False


def test_a_worker_is_a_fork_with_an_environment_a_log_and_a_session_of_its_own(server: ForkServer, tmp_path: Path) -> None:
    workers = [Worker(server.address, tmp_path / f"{mood}.log", MOOD=mood).ready() for mood in ("calm", "merry")]
    for worker, mood in zip(workers, ("calm", "merry"), strict=True):
        pid = worker.process.pid
        assert worker.log.read_text() == f"imported by {server.pid}, I am {pid} of session {pid}, mood {mood}\n"
        assert worker.process.poll() is None
        worker.process.terminate()
        assert worker.process.wait(timeout=DEADLINE_S) == -signal.SIGTERM


def test_the_exit_code_arrives(server: ForkServer, tmp_path: Path) -> None:
    worker = Worker(server.address, tmp_path / "log", MOOD="short").ready()
    assert worker.process.wait(timeout=DEADLINE_S) == 7
    assert worker.process.poll() == 7


def test_a_worker_that_runs_on_is_waited_for_so_long_and_killed(server: ForkServer, tmp_path: Path) -> None:
    worker = Worker(server.address, tmp_path / "log", MOOD="busy").ready()
    with pytest.raises(subprocess.TimeoutExpired):
        worker.process.wait(timeout=0.01)
    worker.process.kill()
    assert worker.process.wait(timeout=DEADLINE_S) == -signal.SIGKILL


@pytest.mark.parametrize("mood", ["calm", "busy"])
def test_a_worker_dies_with_its_supervisor_even_in_the_middle_of_a_loop(server: ForkServer, tmp_path: Path, mood: str) -> None:
    supervisor = subprocess.Popen(
        [
            sys.executable,
            "-c",
            textwrap.dedent(
                f"""
                import os, sys, time
                from antiphon.apps.supervision.forked_process import ForkedProcess
                read, write = os.pipe()
                process = ForkedProcess({server.address!r}, {{**os.environ, "MOOD": {mood!r}}}, log=1, events=write, timeout_s=30)
                os.read(read, 1)
                print(process.pid, flush=True)
                time.sleep(600)
                """
            ),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert supervisor.stdout is not None
    pid = int(next(line for line in supervisor.stdout if line.strip().isdigit()))
    supervisor.kill()
    supervisor.wait(DEADLINE_S)
    supervisor.stdout.close()
    assert gone(pid)


def test_a_server_that_is_killed_takes_no_worker_along_and_makes_no_more(tmp_path: Path) -> None:
    server = a_server(tmp_path)
    worker = Worker(server.address, tmp_path / "log").ready()
    os.kill(server.pid, signal.SIGKILL)
    assert gone(server.pid)
    assert worker.process.poll() is None
    with pytest.raises(Unavailable, match="does not answer"):
        Worker(server.address, tmp_path / "second")
    worker.process.kill()
    assert worker.process.wait(timeout=DEADLINE_S) != 0  # nobody is left who could know the signal
    server.close()
    assert not Path(server.address).exists()


def test_a_server_that_was_killed_is_replaced_at_the_same_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork_server, "_AGAIN_S", 0.0)
    with a_server(tmp_path) as server:
        worker, first = Worker(server.address, tmp_path / "log").ready(), server.pid
        server.revive()
        assert server.pid == first  # it lives
        os.kill(first, signal.SIGKILL)
        assert gone(first)
        server.revive()
        assert server.pid != first
        second = Worker(server.address, tmp_path / "second").ready()
        assert worker.process.poll() is None
        for process in (worker.process, second.process):
            process.kill()
            process.wait(timeout=DEADLINE_S)


def test_a_server_that_ends_at_once_is_not_started_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork_server, "_AGAIN_S", 3600.0)
    server = ForkServer(tmp_path, modules=("no_such_module",))
    try:
        pid = server.pid
        assert gone(pid)
        server.revive()
        assert server.pid == pid
    finally:
        server.close()


def test_a_server_with_threads_refuses_and_says_why(tmp_path: Path) -> None:
    with a_server(tmp_path, STANDIN_THREAD="1") as server, pytest.raises(Unavailable, match="has 2 threads"):
        Worker(server.address, tmp_path / "log")


def test_nonsense_at_the_socket_costs_the_server_nothing(server: ForkServer, tmp_path: Path) -> None:
    import socket

    for nonsense in (b"", b"\xff\xff\xff\xff", b"\x00\x00\x00\x02[]", b"GET / HTTP/1.1\r\n\r\n"):
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.settimeout(DEADLINE_S)
            stranger.connect(server.address)
            stranger.sendall(nonsense)
            stranger.shutdown(socket.SHUT_WR)
            assert b"error" in stranger.recv(1000)
    worker = Worker(server.address, tmp_path / "log", MOOD="short").ready()
    assert worker.process.wait(timeout=DEADLINE_S) == 7


def test_nothing_is_left_of_a_worker_whose_supervisor_did_not_wait_for_it(server: ForkServer, tmp_path: Path) -> None:
    import json
    import socket
    import struct

    environment = json.dumps(dict(os.environ)).encode()
    life, held = os.pipe()
    with (tmp_path / "log").open("ab") as log, socket.socket(socket.AF_UNIX) as hasty:
        hasty.connect(server.address)
        socket.send_fds(hasty, [struct.pack("!I", len(environment))], [log.fileno(), log.fileno(), life])
        hasty.sendall(environment)
    os.close(held)
    os.close(life)
    worker = Worker(server.address, tmp_path / "second", MOOD="short").ready()  # behind the hasty one in the queue
    assert worker.process.wait(timeout=DEADLINE_S) == 7
    deadline = time.monotonic() + DEADLINE_S
    while children := psutil.Process(server.pid).children():
        assert time.monotonic() < deadline, f"left: {[(child.pid, child.status()) for child in children]}"
        time.sleep(0.01)


def test_no_server_where_a_socket_does_not_fit(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    assert ForkServer.start(deep) is None
