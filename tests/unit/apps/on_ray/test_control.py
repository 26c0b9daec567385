"""Whether Ray's control process lives, on processes and ports that stand for it."""

import socket
import subprocess
import time
from collections.abc import Callable

import pytest

from antiphon.apps.on_ray.control import ControlLost, ControlWatch


def when_lost(watch: ControlWatch, advance: Callable[[], None] = lambda: None) -> str:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            watch.check()
        except ControlLost as error:
            return str(error)
        advance()
    pytest.fail("nobody noticed")


def test_a_child_that_is_killed_is_lost_and_named_by_its_signal() -> None:
    with subprocess.Popen(["sleep", "600"]) as child:
        watch = ControlWatch.of_child("sleep")
        assert watch is not None
        watch.check()
        child.kill()
        assert "gcs_server was killed by SIGKILL" in when_lost(watch)
        assert child.wait() == -9  # its status is still whoever's it was


def test_a_child_that_ends_by_itself_is_lost_with_its_status() -> None:
    with subprocess.Popen(["sh", "-c", "read line; exit 3"], stdin=subprocess.PIPE) as child:
        watch = ControlWatch.of_child("sh")
        assert watch is not None
        assert child.stdin is not None
        child.stdin.close()
        assert "ended with status 3" in when_lost(watch)


def test_without_such_a_child_there_is_nothing_to_watch() -> None:
    assert ControlWatch.of_child("no-such-child") is None


def test_a_port_where_nobody_listens_any_more_is_lost_and_one_that_is_slow_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("antiphon.apps.on_ray.control.time.monotonic", lambda: now)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        watch = ControlWatch.of_port(address)
        watch.check()
    watch.check()  # too soon after the last look
    now = 60.0
    with pytest.raises(ControlLost, match=f"does not listen at {address} any more"):
        watch.check()
    now = 120.0
    monkeypatch.setattr(
        "antiphon.apps.on_ray.control.socket.create_connection", lambda *_, **__: (_ for _ in ()).throw(TimeoutError())
    )
    watch.check()
