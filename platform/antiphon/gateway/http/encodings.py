"""Bodies that a client compressed, as they were (request speed).

    content-encoding: gzip | x-gzip | deflate ─► pieces of at most PIECE_BYTES ─► the door's limits, on what a body really holds

A body is never held as a whole here: a bomb ends at the limit of the door that reads it. Must not know: any route.
"""

from __future__ import annotations

import zlib
from typing import Any, Final

from starlette.types import Message, Receive, Scope

from antiphon.core.errors import InvalidInput

PIECE_BYTES: Final = 64 * 2**10
TAKEN: Final = "gzip, deflate"
_WINDOW: Final = {"gzip": 16 + zlib.MAX_WBITS, "x-gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}


class EncodingUnknown(InvalidInput):
    """The body is compressed in a way that is not taken here."""

    code = "unsupported_encoding"
    http_status = 415


def decoded(scope: Scope, receive: Receive) -> tuple[Scope, Receive]:
    """A request as if it had not been compressed; itself where it was not.

    Raises:
        EncodingUnknown: it is compressed in another way, or more than once.
    """
    named = [value.strip().lower() for key, value in scope["headers"] if key == b"content-encoding" for value in value.split(b",")]
    given = [name.decode("latin-1") for name in named if name not in (b"", b"identity")]
    if not given:
        return scope, receive
    if len(given) > 1 or given[0] not in _WINDOW:
        raise EncodingUnknown(f"content-encoding {', '.join(given)[:64]!r} is not taken here; taken: {TAKEN}", "content-encoding")
    headers = [(key, value) for key, value in scope["headers"] if key not in (b"content-encoding", b"content-length")]
    return {**scope, "headers": headers}, _Decoder(given[0], receive)


class _Decoder:
    def __init__(self, name: str, receive: Receive) -> None:
        self._name = name
        self._receive = receive
        self._stream = zlib.decompressobj(_WINDOW[name])
        self._waiting = b""  # compressed bytes that came, and that no piece holds yet
        self._more = True  # the client sends further ones
        self._ended = False

    async def __call__(self) -> Message:
        """The next event: a piece of the body, or that the client left."""
        while not self._ended:
            if self._waiting:
                return self._piece()
            if not self._more:
                self._ended = True
                if not self._stream.eof:
                    raise self._broken("it ends too early")
                return _body(b"", more=False)
            event = await self._receive()
            if event["type"] != "http.request":
                return event
            self._waiting = event.get("body", b"")
            self._more = event.get("more_body", False)
        return await self._receive()

    def _piece(self) -> dict[str, Any]:
        if self._stream.eof:
            raise self._broken("bytes follow its end")
        try:
            piece = self._stream.decompress(self._waiting, PIECE_BYTES)
        except zlib.error as error:
            raise self._broken(str(error)) from error
        self._waiting = self._stream.unused_data or self._stream.unconsumed_tail
        return _body(piece, more=True)

    def _broken(self, why: str) -> InvalidInput:
        self._ended = True
        return InvalidInput(f"the body is not valid {self._name}: {why}", "content-encoding")


def _body(piece: bytes, *, more: bool) -> dict[str, Any]:
    return {"type": "http.request", "body": piece, "more_body": more}
