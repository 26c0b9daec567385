"""Reads bodies within limits: bytes of one and of all, values in one, large ones few at once (request speed).

    bytes ─► few enough? ─► few enough values, not too deep? ─► JSON, large ones off the event loop ─► an object, no key in it twice

Parsing costs memory and time by the number of values, not by bytes: the number is bounded before anything is made of them. What is
made of a large body's object afterwards (typed fields, messages) costs more than reading it did, and is off the event loop as well.
Must not know: what is in a body.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final, ParamSpec, TypeVar

from fastapi import Request

from antiphon.core.errors import InvalidInput, Overloaded
from antiphon.core.text.json_text import MAX_DEPTH, READABLE_DEPTH, KeyCount, depth_bound, is_deeper, structure

_P = ParamSpec("_P")
_T = TypeVar("_T")

MAX_CONTAINERS: Final = 100_000  # lists and objects in one body
MAX_VALUES: Final = 1_500_000  # token ids of many prompts are the most that makes sense
MAX_BUFFERED_BYTES: Final = 256 * 2**20  # of all bodies that are being read
LARGE_BYTES: Final = 64 * 2**10
_LARGE_AT_ONCE: Final = 2

# Half of a surrogate pair has no other way into JSON that is UTF-8.
_SURROGATES: Final = re.compile(rb"\\u[dD][89a-fA-F]")


class RequestTooLarge(InvalidInput):
    """The body is larger than this gateway takes."""

    code = "request_too_large"
    http_status = 413
    grpc_status = "RESOURCE_EXHAUSTED"


class Bodies:
    """What the bodies of one gateway may cost together. Belongs to one event loop."""

    def __init__(self, max_buffered_bytes: int = MAX_BUFFERED_BYTES) -> None:
        self._max_buffered_bytes = max_buffered_bytes
        self._large = asyncio.Semaphore(_LARGE_AT_ONCE)
        self.buffered_bytes = 0

    async def read(self, request: Request, max_bytes: int) -> bytes:
        """The body, whole.

        Raises:
            RequestTooLarge: it has more than ``max_bytes`` bytes.
            Overloaded: too many bodies are being read at once.
        """
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > max_bytes:
            raise RequestTooLarge(f"the body has {length} bytes, above the limit of {max_bytes}")
        body = bytearray()
        try:
            async for chunk in request.stream():
                body += chunk
                self.buffered_bytes += len(chunk)
                if len(body) > max_bytes:
                    raise RequestTooLarge(f"the body is above the limit of {max_bytes} bytes")
                if self.buffered_bytes > self._max_buffered_bytes:
                    raise Overloaded("too many large requests at once", retry_after_s=1.0)
        finally:
            self.buffered_bytes -= len(body)
        return bytes(body)

    async def read_json(self, request: Request, max_bytes: int) -> dict[str, Any]:
        """The body, a JSON object.

        Raises:
            RequestTooLarge, Overloaded: as ``read``.
            InvalidInput: it isn't UTF-8, JSON or an object, or holds too many values.
        """
        body = await self.read(request, max_bytes)
        request.state.num_body_bytes = len(body)
        return await self.work(request, parse_object, body)

    async def work(self, request: Request, make: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """``make(...)`` of a body that ``read_json`` read from a request; that of a large one holds nobody else up."""
        if request.state.num_body_bytes <= LARGE_BYTES:
            return make(*args, **kwargs)
        async with self.turn(request.state.num_body_bytes):
            return await asyncio.to_thread(make, *args, **kwargs)

    @asynccontextmanager
    async def turn(self, num_bytes: int) -> AsyncIterator[None]:
        """Wait until few other large bodies are worked on; small ones need no turn."""
        if num_bytes <= LARGE_BYTES:
            yield
            return
        async with self._large:
            yield


def parse_object(body: bytes) -> dict[str, Any]:
    """JSON text as an object.

    Raises:
        InvalidInput: it isn't UTF-8, JSON or an object, holds too many values, a key twice, or what no answer could repeat.
    """
    check_structure(body)
    if (depth := depth_bound(body)) > READABLE_DEPTH:
        raise InvalidInput("the body is nested too deeply")
    keys = KeyCount()
    endless: list[str] = []  # 1e999: JSON can write it, but no answer could repeat it

    def number(text: str) -> float:
        found = float(text)
        if math.isinf(found):
            endless.append(text)
        return found

    try:
        text = body.decode("utf-8-sig")
        value = json.loads(text, object_hook=keys.count, parse_constant=_refuse_constant, parse_float=number)
    except UnicodeDecodeError as error:
        raise InvalidInput(f"the body is not valid UTF-8: byte {error.start}") from error
    except ValueError as error:
        raise InvalidInput(f"the body is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidInput("the body must be a JSON object")
    if endless:
        field = next((name for name, inner in value.items() if _holds_infinity(inner)), None)
        raise InvalidInput(f"{endless[0][:32]} is beyond every float", field)
    if depth > MAX_DEPTH and is_deeper(value, MAX_DEPTH):
        field = next(name for name, inner in value.items() if is_deeper(inner, MAX_DEPTH - 1))
        raise InvalidInput(f"{field[:64]}: nested more than {MAX_DEPTH} deep", field)
    if b"\\" in body and _SURROGATES.search(body) and (path := _half_a_pair(value)) is not None:
        raise InvalidInput(f"{path or 'the body'}: not valid Unicode: it holds half of a surrogate pair", path or None)
    if (key := keys.repeated(body)) is not None:
        raise InvalidInput(f"the key {key[:64]!r} is there twice", key[:64])
    return value


def check_structure(body: bytes) -> None:
    """Refuse what would be too many values, before they are made.

    Raises:
        InvalidInput: it holds more than MAX_CONTAINERS lists and objects, or MAX_VALUES values.
    """
    if len(body) <= MAX_CONTAINERS or (body.count(b"[") + body.count(b"{") <= MAX_CONTAINERS and body.count(b",") <= MAX_VALUES):
        return
    signs = structure(body)  # brackets and commas within texts are no structure
    if signs.count(b"[") + signs.count(b"{") > MAX_CONTAINERS:
        raise InvalidInput(f"the body holds more than {MAX_CONTAINERS} lists and objects")
    if signs.count(b",") > MAX_VALUES:
        raise InvalidInput(f"the body holds more than {MAX_VALUES} values")


def _holds_infinity(value: object) -> bool:
    waiting = [value]
    while waiting:
        match waiting.pop():
            case float() as found if math.isinf(found):
                return True
            case list() as items:
                waiting += items
            case dict() as fields:
                waiting += fields.values()
    return False


def _half_a_pair(value: object) -> str | None:
    """The path of a text that has no UTF-8 form, a field's name included; None = there is none. The depth is bounded."""
    if isinstance(value, str):
        return None if _is_unicode(value) else ""
    inner = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else ()
    for key, item in inner:
        if isinstance(key, str) and not _is_unicode(key):
            return ""
        if isinstance(item, str | list | dict) and (rest := _half_a_pair(item)) is not None:
            head = f"[{key}]" if isinstance(key, int) else key
            return f"{head}{'' if not rest or rest[0] == '[' else '.'}{rest}"
    return None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")
