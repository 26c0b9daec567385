"""Which revision runs in a deployment's parts, asked of its gateways' /ready (control speed).

A gateway tells its own revision, and how many workers of each pool it knows by theirs. Must not know: what follows from it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import httpx2

READY_PATH = "/ready"
_DEADLINE_S = 2.0  # a gateway answers this at once or is not to be reached from here
_MOST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayWord:
    """What one gateway says."""

    revision: str
    revisions: Mapping[str, Mapping[str, int]]  # pool -> revision -> workers that take work


class GatewaySource(Protocol):
    """Asks gateways."""

    async def ask(self, urls: Mapping[str, str]) -> Mapping[str, GatewayWord]:
        """What those say that answer and name a revision; never raises for one that does not.

        Args:
            urls: where each gateway is, without a path, by the name of its pod.
        """
        ...


class AskedGateways:
    """Asks over HTTP, all at once. One event loop owns it."""

    def __init__(self, *, deadline_s: float = _DEADLINE_S) -> None:
        self._deadline_s = deadline_s
        self._client = httpx2.AsyncClient(timeout=deadline_s, verify=False)  # see scrape.ScrapedMetrics

    async def __aenter__(self) -> AskedGateways:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def ask(self, urls: Mapping[str, str]) -> Mapping[str, GatewayWord]:
        """See GatewaySource."""
        words = await asyncio.gather(*(self._ask(url) for url in urls.values()))
        return {name: word for name, word in zip(urls, words, strict=True) if word is not None}

    async def _ask(self, url: str) -> GatewayWord | None:
        try:
            async with asyncio.timeout(self._deadline_s):
                # 503 where it has no workers: it tells its revision all the same.
                answer = await self._client.get(f"{url}{READY_PATH}")
        except (httpx2.HTTPError, TimeoutError):
            return None
        if len(answer.content) > _MOST_BYTES:
            return None
        try:
            return word_in(answer.json())
        except ValueError:
            return None


def word_in(body: Any) -> GatewayWord | None:
    """What the body of an answer says; None when it names no revision, as gateways of older images don't.

    Raises:
        ValueError: it is none of ours.
    """
    if not isinstance(body, dict) or not body.get("revision"):
        return None
    try:
        pools = {str(p): {str(r): int(n) for r, n in counts.items()} for p, counts in body.get("revisions", {}).items()}
    except (AttributeError, TypeError) as error:
        raise ValueError(f"not a gateway's answer: {error}") from error
    return GatewayWord(revision=str(body["revision"]), revisions=pools)
