"""Streams of raw bytes: what idle and many peers leave behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from antiphon.core.errors import PeerLost
from antiphon.rpc.raw_stream import RawServer, RawStream, open_stream

MANY = 100


def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> bool:
    end_s = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < end_s:
        time.sleep(0.01)
    return condition()


def server_threads() -> int:
    return sum(thread.name.startswith(("raw-server", "raw-stream")) for thread in threading.enumerate())


def test_streams_that_have_ended_leave_no_threads() -> None:
    taken: list[RawStream] = []
    server = RawServer("127.0.0.1:0", taken.append, max_receive_bytes=1 << 20)
    streams = [open_stream(f"127.0.0.1:{server.port}", max_receive_bytes=1 << 20) for _ in range(MANY)]
    try:
        for stream in streams:
            stream.send(b"here")
        assert until(lambda: len(taken) == MANY)
        assert server_threads() >= MANY
        for stream in streams:
            stream.end()
        for stream in taken:
            stream.close()
        for stream in streams:
            stream.close()
        assert until(lambda: server_threads() == 0), server_threads()
        again = open_stream(f"127.0.0.1:{server.port}", max_receive_bytes=1 << 20)
        again.send(b"later")
        assert until(lambda: len(taken) == MANY + 1)
        assert taken[-1].receive(5.0) == b"later"
        again.close()
        taken[-1].close()
    finally:
        server.close()


def test_a_stream_beyond_the_limit_is_refused_and_its_room_is_the_next_ones() -> None:
    taken: list[RawStream] = []
    server = RawServer("127.0.0.1:0", taken.append, max_receive_bytes=1 << 20)
    address = f"127.0.0.1:{server.port}"
    streams = [open_stream(address, max_receive_bytes=1 << 20) for _ in range(256)]
    try:
        for stream in streams:
            stream.send(b"here")
        assert until(lambda: len(taken) == 256, 60.0)
        refused = open_stream(address, max_receive_bytes=1 << 20)
        with pytest.raises(PeerLost):
            refused.receive(10.0)
        refused.close()
        for stream in (streams.pop(), taken.pop(0)):
            stream.end()
        for stream in taken:
            stream.end()
        assert until(lambda: server_threads() < 256)
    finally:
        for stream in [*streams, *taken]:
            stream.close()
        server.close()
