"""uvicorn's HTTP protocol with limits: headers in bytes, number and time, bodies and readers in time, connections (request speed).

uvicorn on httptools has none of these: a client may send headers without end, open connections and stay silent, or ask and never
read. What is over a limit is answered in OpenAI's error shape and closed; who was silent all the time is closed alone; who takes
nothing of an answer is cut off. Must not know: any route.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any, ClassVar, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from antiphon.rpc.credentials import files_for

MAX_HEADER_BYTES: Final = 64 * 2**10
MAX_HEADERS: Final = 256
HEADER_TIMEOUT_S: Final = 20.0  # from the connection, or a further request's first byte, to the end of its headers
BODY_TIMEOUT_S: Final = 60.0
WRITE_TIMEOUT_S: Final = 60.0  # that a client may take nothing of what is there for it
MAX_CONNECTIONS: Final = 8192
_AT_MOST_ONCE: Final = (b"authorization", b"x-api-key", b"last-event-id", b"content-type")
_LINGER_S: Final = 1.0
_NOT_THERE: Final = object()
_MAX_DISCARDED_BYTES: Final = 2**20
_MAX_BODY_BYTES: Final = 256 * 2**20  # on the wire, chunks' own bytes included; doors have limits of their own, below this


def max_connections() -> int:
    """How many connections this process can hold, by its limit of open files."""
    return files_for(0.75, MAX_CONNECTIONS)


class BoundedProtocol(HttpToolsProtocol):
    """One connection. Belongs to the server's event loop."""

    # Class attributes, so that a test can tighten them in a class of its own.
    header_timeout_s: float = HEADER_TIMEOUT_S
    body_timeout_s: float = BODY_TIMEOUT_S
    write_timeout_s: float = WRITE_TIMEOUT_S
    max_connections: int = MAX_CONNECTIONS
    on_refused: Callable[[str], None] = staticmethod(lambda _code: None)  # counts what no route sees, by its code
    _awaited: ClassVar[dict[BoundedProtocol, None]] = {}  # of one server: whose next bytes are waited for, longest first

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._awaited = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_headers = True
        self._begun = False  # a request's first byte is here, its last is not
        self._refused = False
        self._num_headers = 0
        self._header_bytes = 0  # of whole headers
        self._received_bytes = 0  # since the last part of a request was complete
        self._empty_bytes = 0  # of a body, that came since its last byte: chunks' extensions, trailers
        self._timer: asyncio.TimerHandle | None = None
        self._reading: asyncio.TimerHandle | None = None  # looks whether the client takes what is written
        self._is_paused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client connected."""
        super().connection_made(transport)
        if len(self.connections) > self.max_connections and not self._make_room():
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "this gateway holds as many connections as it can", "overloaded")
            return
        self._awaited[self] = None
        self._start(self.header_timeout_s, "the request's headers")

    def connection_lost(self, exc: Exception | None) -> None:
        """It left."""
        self._stop()
        self._awaited.pop(self, None)
        if self._reading is not None:
            self._reading.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of a request."""
        self._received_bytes += len(data)
        if self._refused:
            if self._received_bytes > _MAX_DISCARDED_BYTES:
                self.transport.abort()
            return
        if self._in_headers and self._timer is None:  # a further request of this connection
            self._start(self.header_timeout_s, "the request's headers")
        self._empty_bytes += len(data)
        super().data_received(data)
        if self._refused or self.transport.is_closing():
            return
        if self._begun and self._in_headers and self._timer is None:  # its first bytes came with the end of the one before
            self._start(self.header_timeout_s, "the request's headers")
        # Behind a body, and between its parts: the parser keeps trailers, however long.
        if (self._received_bytes if self._in_headers else self._empty_bytes) > MAX_HEADER_BYTES:
            self._refuse_headers()
        elif self._received_bytes > _MAX_BODY_BYTES:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "the body is too large", "request_too_large")

    def on_message_begin(self) -> None:
        """A request's first byte."""
        self._num_headers = self._header_bytes = 0
        self._begun = True
        if self._awaited.pop(self, _NOT_THERE) is None:  # it moves to the end: it has just asked
            self._awaited[self] = None
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """A part of its target."""
        self._header_bytes += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header, or a trailer after the body."""
        self._num_headers += 1
        self._header_bytes += len(name) + len(value) + 4
        if not self._over:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """All headers are here."""
        self._stop()
        self._in_headers = False
        self._received_bytes = self._empty_bytes = 0
        if self._over:
            self._refuse_headers()
            return
        version = self.parser.get_http_version()
        num_hosts = sum(name == b"host" for name, _ in self.headers)
        if version not in ("1.0", "1.1"):
            self._refuse(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, f"HTTP {version} is not spoken here", "bad_request")
            return
        if num_hosts != 1 and (version == "1.1" or num_hosts):
            self._refuse(HTTPStatus.BAD_REQUEST, "expected one Host header", "bad_request")
            return
        names = [name for name, _ in self.headers]
        twice = next((name for name in _AT_MOST_ONCE if names.count(name) > 1), None)
        if twice is not None:  # what stands before this door may count another of them than we do
            self._refuse(HTTPStatus.BAD_REQUEST, f"the header {twice.decode()} may be given once", "bad_request")
            return
        if _has_two_keys(self.headers):
            self._refuse(HTTPStatus.BAD_REQUEST, "x-api-key and authorization hold two keys: send one", "bad_request")
            return
        self._start(self.body_timeout_s, "the request's body")
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._empty_bytes = 0
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole."""
        self._stop()
        self._in_headers, self._begun = True, False
        self._received_bytes = 0
        self._awaited.pop(self, None)
        if not self._refused:
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """What it sent is no HTTP."""
        self.on_refused("bad_request")
        super().send_400_response(msg)
        self._watch_reading()

    def _unsupported_upgrade_warning(self) -> None:
        """uvicorn's two lines in the log for each request that asks for a protocol we do not speak: it is answered in ours."""

    def pause_writing(self) -> None:
        """The client does not read as fast as we answer."""
        self._is_paused = True
        super().pause_writing()
        self._watch_reading()

    def resume_writing(self) -> None:
        """It has read on."""
        self._is_paused = False
        super().resume_writing()

    def on_response_complete(self) -> None:
        """An answer is written, if not sent: a connection that is closed stays until its last byte is taken."""
        super().on_response_complete()
        if self.cycle.response_complete and not self.transport.is_closing():
            self._awaited[self] = None
        self._watch_reading()

    def _watch_reading(self) -> None:
        left = self.transport.get_write_buffer_size()
        if left and self._reading is None:
            self._reading = self.loop.call_later(self.write_timeout_s, self._look_at_reading, left)

    def _look_at_reading(self, before: int) -> None:
        """Nothing is added where writing is paused or has ended, so that what is no less was not read."""
        self._reading = None
        if (self._is_paused or self.transport.is_closing()) and self.transport.get_write_buffer_size() >= before:
            self.on_refused("client_not_reading")
            self.transport.abort()
            return
        self._watch_reading()

    def _make_room(self) -> bool:
        """End the connection whose next bytes are waited for longest; False where every one is being answered."""
        oldest = next(iter(self._awaited), None)
        if oldest is None:
            return False
        del self._awaited[oldest]
        if oldest._refused:
            oldest.transport.abort()
        elif oldest._begun:
            why = "this gateway holds as many connections as it can, and waited longest for the rest of this request"
            oldest._refuse(HTTPStatus.SERVICE_UNAVAILABLE, why, "overloaded", linger_s=0.0)
        else:
            oldest._stop()
            oldest._refused = True
            oldest.transport.close()
        return True

    @property
    def _over(self) -> bool:
        return self._header_bytes > MAX_HEADER_BYTES or self._num_headers > MAX_HEADERS

    def _refuse_headers(self) -> None:
        message = f"the request's headers are above the limit of {MAX_HEADERS}, or of {MAX_HEADER_BYTES} bytes"
        self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, message, "headers_too_large")

    def _start(self, timeout_s: float, what: str) -> None:
        self._timer = self.loop.call_later(timeout_s, self._late, what, timeout_s)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self, what: str, timeout_s: float) -> None:
        self._timer = None
        if not self._begun and not self._received_bytes:  # it has asked nothing: an answer would meet its first request on the way
            self._refused = True
            self.transport.close()
            return
        message = f"{what} did not come within {timeout_s:g} s"
        self._refuse(HTTPStatus.REQUEST_TIMEOUT, message, "request_timeout")

    def _refuse(self, status: HTTPStatus, message: str, code: str, *, linger_s: float = _LINGER_S) -> None:
        """Answer and close; where an answer is under way already, close."""
        self._stop()
        self._refused = True
        self.on_refused(code)
        if self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        if self.cycle is not None and not self.cycle.response_complete and self.cycle.response_started:
            self.transport.abort()
            return
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        kind = "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
        body = json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}}).encode()
        lines = [
            f"HTTP/1.1 {status.value} {status.phrase}",
            "content-type: application/json",
            f"content-length: {len(body)}",
            "connection: close",
            *(["retry-after: 1"] if status is HTTPStatus.SERVICE_UNAVAILABLE else []),
        ]
        self.transport.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        # Closing with unread bytes resets the connection, and the answer is lost: what still comes is thrown away for a moment.
        self._received_bytes = 0
        self._timer = self.loop.call_later(linger_s, self.transport.close)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._watch_reading()


def _has_two_keys(headers: Sequence[tuple[bytes, bytes]]) -> bool:
    """Whether the two headers that may hold a key hold different ones: routes differ in which of them counts."""
    found = {name: value for name, value in headers if name in (b"x-api-key", b"authorization")}
    scheme, _, key = found.get(b"authorization", b"").partition(b" ")
    return b"x-api-key" in found and scheme.lower() == b"bearer" and key.strip() != found[b"x-api-key"].strip()
