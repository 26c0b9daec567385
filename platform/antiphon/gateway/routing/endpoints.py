"""Which gateway replica gets a request that a Gateway of Kubernetes brings: who has seen its beginning (request speed, pure).

Replicas are ranked by rendezvous hashing of the prompt's beginning, so that a conversation meets the replica which remembers its
workers, and a replica that comes or goes moves only its own share. One that has much more than its part of the requests comes last
(bounded loads). Must not know: the protocol, or how replicas are found.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from antiphon.core.text.json_text import read_json_text

KEY_CHARS = 1024  # of the first messages: system prompt and first question tell conversations apart
_MAX_SHARE = 1.25  # of the mean load, and one request: the usual bound of consistent hashing with bounded loads


class EndpointBoard:
    """Counts what was sent where by this process. Belongs to one event loop."""

    def __init__(self) -> None:
        self._inflight: Counter[str] = Counter()

    def rank(self, key: str, endpoints: Sequence[str]) -> tuple[str, ...]:
        """``endpoints``, best first."""
        return rank_endpoints(key, endpoints, self._inflight)

    @contextmanager
    def count(self, endpoint: str) -> Iterator[None]:
        """A request is there inside."""
        self._inflight[endpoint] += 1
        try:
            yield
        finally:
            self._inflight[endpoint] -= 1
            if self._inflight[endpoint] <= 0:
                del self._inflight[endpoint]


def rank_endpoints(key: str, endpoints: Sequence[str], inflight: Mapping[str, int]) -> tuple[str, ...]:
    """``endpoints``, best first: by hash, those beyond the bounded load last."""
    if not endpoints:
        return ()
    most = _MAX_SHARE * sum(inflight.get(e, 0) for e in endpoints) / len(endpoints) + 1
    return tuple(sorted(set(endpoints), key=lambda e: (inflight.get(e, 0) >= most, -_score(key, e))))


def _score(key: str, endpoint: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{endpoint}\n{key}".encode(errors="surrogatepass"), digest_size=8).digest(), "big")


def key_of(body: bytes) -> str:
    """What names the conversation of a request body: its model and the beginning of what it says.

    A body that is no JSON object is its own key: the replica will say what is wrong with it.
    """
    try:
        value: Any = read_json_text(body)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        return body[:KEY_CHARS].decode(errors="replace")
    said = next((value[name] for name in ("messages", "prompt", "input") if value.get(name)), "")
    start = said if isinstance(said, str) else json.dumps(said[:2] if isinstance(said, list) else said, sort_keys=True)
    return f"{value.get('model', '')}\n{value.get('system', '')}\n{start}"[:KEY_CHARS]
