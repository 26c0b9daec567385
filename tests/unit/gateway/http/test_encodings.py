"""Compressed bodies are read as if they had not been, however they arrive, and never grow beyond a door's limit."""

from __future__ import annotations

import gzip
import json
import tracemalloc
import zlib
from collections.abc import Callable, Iterator

import pytest
from fastapi import Request
from starlette.types import Message

from antiphon.core.errors import InvalidInput
from antiphon.gateway.http.bodies import Bodies, RequestTooLarge
from antiphon.gateway.http.encodings import EncodingUnknown, decoded

BODY = {"prompt": "ab c" * 50_000}
PLAIN = json.dumps(BODY).encode()
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "GZIP": gzip.compress,
    "deflate": zlib.compress,
}


def request(encoding: str, pieces: list[bytes]) -> Request:
    headers = [(b"content-encoding", encoding.encode()), (b"content-length", str(sum(map(len, pieces))).encode())]
    scope = {"type": "http", "method": "POST", "path": "/", "headers": headers}
    events: Iterator[Message] = iter(
        [{"type": "http.request", "body": piece, "more_body": i + 1 < len(pieces)} for i, piece in enumerate(pieces)]
    )

    async def receive() -> Message:
        return next(events, {"type": "http.disconnect"})

    return Request(*decoded(scope, receive))


@pytest.mark.parametrize("encoding", COMPRESS)
@pytest.mark.parametrize("piece_bytes", [1, 7, 10**6])
async def test_a_compressed_body_is_read_however_it_is_cut(encoding: str, piece_bytes: int) -> None:
    packed = COMPRESS[encoding](PLAIN)
    pieces = [packed[at : at + piece_bytes] for at in range(0, len(packed), piece_bytes)]
    assert await Bodies().read_json(request(encoding, [*pieces, b""]), 10**6) == BODY


async def test_an_encoding_that_says_nothing_changes_nothing() -> None:
    for encoding in ("identity", "", "identity, identity"):
        assert await Bodies().read_json(request(encoding, [PLAIN]), 10**6) == BODY


async def test_a_bomb_ends_at_the_limit() -> None:
    packed = gzip.compress(bytes(200 * 2**20))
    tracemalloc.start()
    with pytest.raises(RequestTooLarge):
        await Bodies().read(request("gzip", [packed]), 2**20)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 8 * 2**20


@pytest.mark.parametrize(
    "packed",
    [gzip.compress(PLAIN)[:-5], gzip.compress(PLAIN)[:1], b"", PLAIN, gzip.compress(PLAIN) + b"x"],
    ids=["cut", "one byte", "empty", "plain", "followed"],
)
async def test_a_broken_one_is_a_clear_refusal(packed: bytes) -> None:
    with pytest.raises(InvalidInput, match="not valid gzip") as refused:
        await Bodies().read(request("gzip", [packed]), 10**6)
    assert refused.value.field == "content-encoding"


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "compress", "\xff"])
def test_what_is_not_taken_is_named_beside_what_is(encoding: str) -> None:
    with pytest.raises(EncodingUnknown, match="taken: gzip, deflate"):
        request(encoding, [PLAIN])
