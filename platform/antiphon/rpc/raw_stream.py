"""Bidirectional gRPC streams of raw bytes, without protobuf: the portable carrier of the data plane (hot, but never the fast one).

Each stream has two threads an end: one blocks on the network and hands frames to a sink, one blocks on the outbox. Neither
runs while nothing moves. Must not know: what a frame means.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

import grpc

from antiphon.core.errors import PeerLost, Unavailable
from antiphon.core.identity import Identity
from antiphon.rpc.credentials import TARGET_OPTIONS, channel_credentials, knocking_options, server_credentials
from antiphon.rpc.doors.crowd import Crowd, RunningCalls

_SERVICE, _METHOD = "antiphon.transport.RawStream", "Open"
_MAX_STREAMS = 256  # a thread each, for as long as it is open
_CLOSE_S = 1.0  # how long a close waits for the peer to take what is under way
_KEEPALIVE = [
    ("grpc.keepalive_time_ms", 2_000),  # a connection that is cut is lost after both
    ("grpc.keepalive_timeout_ms", 2_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
P = ParamSpec("P")
T = TypeVar("T")
Sink = Callable[[bytes | None], None]  # takes each frame, and None once when the stream has ended; called in a thread


class RawStream:
    """One end of an open stream. ``send`` and ``close`` may be called from any thread."""

    def __init__(self, peer: str) -> None:
        """``open_stream`` and ``RawServer`` make these; ``peer`` is a name for errors."""
        self.peer = peer
        self.lost: str | None = None  # why the stream ended, once it has
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._inbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._sink: Sink | None = None
        self._lock = threading.Lock()
        self._reader: threading.Thread | None = None
        self._finish: Callable[[], None] = lambda: None

    def send(self, frame: bytes) -> None:
        """Queue a frame; never blocks. Frames sent after the stream ended go nowhere."""
        self._outbox.put(frame)

    def receive(self, timeout_s: float) -> bytes:
        """The next frame, while no sink is attached. Raises PeerLost when none comes in time."""
        try:
            frame = self._inbox.get(timeout=timeout_s)
        except queue.Empty:
            raise PeerLost(self.peer, f"it said nothing for {timeout_s:.1f} s") from None
        if frame is None:
            raise PeerLost(self.peer, self.lost or "the stream ended")
        return frame

    def attach(self, sink: Sink) -> None:
        """Give every frame from now on, and those not yet received, to ``sink``."""
        with self._lock:
            while not self._inbox.empty():
                sink(self._inbox.get())
            self._sink = sink

    def end(self) -> None:
        """Send what is queued, then end the stream; never blocks."""
        self._outbox.put(None)

    def close(self) -> None:
        """End the stream and join its threads, giving the peer a moment to take what is queued; idempotent."""
        self.end()
        finish, self._finish = self._finish, lambda: None
        finish()

    def _start_reader(self, frames: Iterator[bytes]) -> threading.Thread:
        self._reader = threading.Thread(target=self._read, args=(frames,), name=f"raw-stream-{self.peer}", daemon=True)
        self._reader.start()
        return self._reader

    def _read(self, frames: Iterator[bytes]) -> None:
        why = "it closed the stream"
        try:
            for frame in frames:
                self._take(frame)
        except grpc.RpcError as error:
            code = error.code() if isinstance(error, grpc.Call) else None
            why = "the connection broke" if code is None else f"{code.name}: {error.details()}"
        except Exception as error:  # noqa: BLE001 - grpc's server raises bare exceptions when a peer breaks off
            why = f"the stream broke: {error}" if str(error) else "the stream broke"
        finally:
            self.lost = why
            self._take(None)
            self._outbox.put(None)

    def _take(self, frame: bytes | None) -> None:
        with self._lock:
            if self._sink is None:
                self._inbox.put(frame)
            else:
                self._sink(frame)

    def _outgoing(self) -> Iterator[bytes]:
        return iter(self._outbox.get, None)


def open_stream(target: str, *, max_receive_bytes: int, identity: Identity | None = None) -> RawStream:
    """Start a stream to ``host:port``, to a part of this deployment; whether anybody is there shows at the first ``receive``."""
    options: list[tuple[str, Any]] = [
        *_KEEPALIVE,
        ("grpc.max_receive_message_length", max_receive_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.use_local_subchannel_pool", 1),  # a connection of its own, so that one link never queues behind another
        ("grpc.enable_http_proxy", 0),
        ("grpc.enable_retries", 0),
        *TARGET_OPTIONS,
    ]
    channel: Any = grpc.secure_channel(
        target, channel_credentials(identity), options=options
    )  # its stubs want serialisers; raw bytes need none
    stream = RawStream(target)
    call = channel.stream_stream(f"/{_SERVICE}/{_METHOD}")(stream._outgoing())
    reader = stream._start_reader(call)

    def finish() -> None:
        reader.join(_CLOSE_S)  # the server ends the stream when it has read ours to the end
        call.cancel()
        reader.join(_CLOSE_S)
        channel.close()

    stream._finish = finish
    return stream


class _Threads(ThreadPoolExecutor):
    """A thread for each call, which ends with it: a pool's own, once started, stay for as long as the server."""

    def __init__(self, max_workers: int, thread_name_prefix: str) -> None:
        super().__init__(max_workers, thread_name_prefix)
        self._name = thread_name_prefix
        self._room = threading.Semaphore(max_workers)
        self._running: set[threading.Thread] = set()
        self._gate = threading.Lock()
        self._is_shut = False

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Start it. Raises RuntimeError: there is no room for another, or this is shut down."""
        future: Future[T] = Future()

        def run() -> None:
            future.set_running_or_notify_cancel()
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:  # noqa: BLE001 - whoever asks the future gets it
                future.set_exception(error)
            finally:
                self._room.release()
                with self._gate:
                    self._running.discard(threading.current_thread())

        with self._gate:
            if self._is_shut or not self._room.acquire(blocking=False):
                raise RuntimeError("no further call is taken")
            thread = threading.Thread(target=run, name=self._name, daemon=True)
            self._running.add(thread)
            try:
                thread.start()
            except RuntimeError:
                self._running.discard(thread)
                self._room.release()
                raise
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no further calls; ``wait`` a moment for those that run."""
        with self._gate:
            self._is_shut = True
            running = tuple(self._running)
        for thread in running if wait else ():
            if thread is not threading.current_thread():
                thread.join(_CLOSE_S)


class RawServer:
    """Takes streams on one port, and gives each to ``on_stream`` in a thread of its own.

    ``close`` refuses new streams; those already open live on, and the last one to close takes the server with it.
    """

    def __init__(
        self,
        address: str,
        on_stream: Callable[[RawStream], None],
        *,
        max_receive_bytes: int,
        identity: Identity | None = None,
    ) -> None:
        """Listen on ``address``, host:port (0: any free one), for parts of this deployment. Raises Unavailable."""
        self._on_stream = on_stream
        self._lock = threading.Lock()
        self._num_streams = 0
        self._closed = False
        self._pool = _Threads(max_workers=_MAX_STREAMS, thread_name_prefix="raw-server")
        self._server = grpc.server(
            self._pool,
            options=[
                *_KEEPALIVE,
                ("grpc.max_receive_message_length", max_receive_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
                ("grpc.http2.max_ping_strikes", 0),
                ("grpc.so_reuseport", 0),
                *knocking_options(),
            ],
            maximum_concurrent_rpcs=_MAX_STREAMS,
        )
        handler = grpc.method_handlers_generic_handler(_SERVICE, {_METHOD: grpc.stream_stream_rpc_method_handler(self._handle)})
        self._server.add_generic_rpc_handlers((handler,))
        try:
            self.port = self._server.add_secure_port(address, server_credentials(identity))
        except RuntimeError as error:
            self._pool.shutdown(wait=False)
            raise Unavailable(f"can't listen on {address}: {error}") from error
        self._running = RunningCalls()
        self._crowd = Crowd(self.port, self._running)
        self._server.start()

    def close(self) -> None:
        """Refuse new streams; stop once the last open one closes. Idempotent."""
        with self._lock:
            self._closed = True
        self._crowd.close()
        self._join_if_done()

    def _handle(self, frames: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        ended = threading.Event()
        peer = context.peer()
        self._running.begin(peer)

        def end() -> None:
            ended.set()
            self._running.end(peer)
            with self._lock:
                self._num_streams -= 1
                last = self._closed and self._num_streams == 0
            if last:
                self._server.stop(grace=0)  # returns at once; None would wait for this very thread
                self._pool.shutdown(wait=False)

        with self._lock:
            refused = self._closed or not context.add_callback(end)
            self._num_streams += not refused
        if refused:
            self._running.end(peer)
            context.abort(grpc.StatusCode.UNAVAILABLE, "the listener is closed")
        stream = RawStream(peer)
        reader = stream._start_reader(frames)

        def finish() -> None:
            ended.wait(_CLOSE_S)
            reader.join(_CLOSE_S)
            self._join_if_done()

        stream._finish = finish
        return self._serve(stream)

    def _serve(self, stream: RawStream) -> Iterator[bytes]:
        self._on_stream(stream)
        yield from stream._outgoing()

    def _join_if_done(self) -> None:
        with self._lock:
            done = self._closed and self._num_streams == 0
        if done:
            self._server.stop(grace=0).wait(_CLOSE_S)
            self._pool.shutdown(wait=True)
