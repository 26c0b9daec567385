"""Measures of deployments, scraped from their gateways' /metrics (control speed).

Latencies are 95th percentiles over the time between two scrapes, from histograms; queues and KV usage are gauges per worker with
the label of their pool. Must not know: what follows from them.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import httpx2
from prometheus_client.parser import text_string_to_metric_families

from antiphon.core.document.spec import LLMDeployment
from antiphon_operator.planning.autoscaler import Metrics
from antiphon_operator.render.names import http_port, http_scheme, http_service

_log = logging.getLogger(__name__)

TTFT = "gen_ai_server_time_to_first_token_seconds"
TPOT = "gen_ai_server_time_per_output_token_seconds"
WAITING = "vllm:num_requests_waiting"
RUNNING = "vllm:num_requests_running"
HELD = "antiphon_requests_held"  # for a sleeping pool's first worker
KV_USAGE = "vllm:kv_cache_usage_perc"
POOL_LABEL = "antiphon_pool"
_DEADLINE_S = 5.0
_MAX_BYTES = 8 << 20  # of an answer; what answers is an image that a document's writer chose
_SAME_S = 5.0  # asked again this soon, the answer is the same: a second pass decides on the figures of the first
_FORGET_S = 600.0  # a deployment not asked for this long is gone
_ALL = ""  # samples without a pool label speak of the whole deployment

Buckets = Mapping[float, float]  # upper bound in seconds -> cumulative count


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scrape:
    """The last answer of one gateway."""

    at_s: float
    histograms: Mapping[str, Buckets]
    metrics: Mapping[str, Metrics]


class ScrapedMetrics:
    """Scrapes gateways. Remembers the last answer of each; one event loop owns it."""

    def __init__(self, *, clock: Callable[[], float], url_of: Callable[[str, LLMDeployment], str] | None = None) -> None:
        self._clock = clock
        self._url_of = url_of if url_of is not None else _service_url
        # Of a door with a certificate whose authority is not known here: counts are read, and nothing is shown to it.
        # Nothing is asked for in a packed form, which unpacks to more than it says.
        self._client = httpx2.AsyncClient(timeout=_DEADLINE_S, verify=False, headers={"accept-encoding": "identity"})
        self._last: dict[tuple[str, str], _Scrape] = {}

    async def __aenter__(self) -> ScrapedMetrics:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def read(self, namespace: str, document: LLMDeployment) -> Mapping[str, Metrics]:
        """See MetricsSource. An unreachable gateway leaves the older measures, which age until they are stale."""
        key, now_s = (namespace, document.metadata.name), self._clock()
        last = self._last.get(key)
        if last is not None and 0 <= now_s - last.at_s < _SAME_S:
            return last.metrics
        try:
            async with asyncio.timeout(_DEADLINE_S):
                text = await self._text(self._url_of(namespace, document))
                before = {} if last is None else last.histograms
                found = await asyncio.to_thread(_parse, text, document, before, self._clock())
        except (httpx2.HTTPError, TimeoutError, ValueError, KeyError) as error:
            _log.warning("%s/%s: the gateway's measures can't be read: %.200s", namespace, document.metadata.name, repr(error))
            return {} if last is None else last.metrics
        for other in [other for other, scrape in self._last.items() if now_s - scrape.at_s > _FORGET_S]:
            del self._last[other]
        self._last[key] = found
        return found.metrics

    async def _text(self, url: str) -> str:
        """An answer's body. Raises ValueError: it is too long, packed, or no text."""
        async with self._client.stream("GET", url) as response:
            response.raise_for_status()
            if response.headers.get("content-encoding", "identity") != "identity":
                raise ValueError("the answer is packed")
            parts, size = [], 0
            async for part in response.aiter_raw():
                parts.append(part)
                size += len(part)
                if size > _MAX_BYTES:
                    raise ValueError(f"the answer has more than {_MAX_BYTES} bytes")
        return b"".join(parts).decode()


def _parse(text: str, document: LLMDeployment, before: Mapping[str, Buckets], now_s: float) -> _Scrape:
    histograms: dict[str, dict[float, float]] = {TTFT: {}, TPOT: {}}
    gauges: dict[tuple[str, str], list[float]] = {}
    busy: list[float] = []
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if not math.isfinite(sample.value):
                raise ValueError(f"{sample.name} is {sample.value}")
            name = sample.name.removesuffix("_bucket")
            if name in histograms and sample.name.endswith("_bucket"):
                bound = float(sample.labels["le"])
                histograms[name][bound] = histograms[name].get(bound, 0.0) + sample.value
            if sample.name in (HELD, WAITING, RUNNING):
                busy.append(sample.value)
            if sample.name in (WAITING, KV_USAGE):
                gauges.setdefault((sample.name, sample.labels.get(POOL_LABEL, _ALL)), []).append(sample.value)
    ttft = percentile_ms(histograms[TTFT], before.get(TTFT, {}))
    tpot = percentile_ms(histograms[TPOT], before.get(TPOT, {}))
    out = {}
    for pool in document.spec.pools:
        waiting = gauges.get((WAITING, pool.name)) or gauges.get((WAITING, _ALL))
        usage = gauges.get((KV_USAGE, pool.name)) or gauges.get((KV_USAGE, _ALL))
        out[pool.name] = Metrics(
            measured_at_s=now_s,
            ttft_p95_ms=ttft,
            tpot_p95_ms=tpot,
            num_waiting=None if waiting is None else sum(waiting),
            kv_usage=None if usage is None else sum(usage) / len(usage),
            num_busy=sum(busy) if busy else None,
        )
    return _Scrape(at_s=now_s, histograms=histograms, metrics=out)


def percentile_ms(now: Buckets, before: Buckets, share: float = 0.95) -> float | None:
    """The percentile of what was recorded between two scrapes, interpolated within its bucket; None when nothing was."""
    counts = {bound: now[bound] - before.get(bound, 0.0) for bound in sorted(now)}
    if any(count < 0 for count in counts.values()):
        counts = {bound: now[bound] for bound in sorted(now)}  # the gateway has restarted
    total = max(counts.values(), default=0.0)
    if total <= 0:
        return None
    rank, lower, below = share * total, 0.0, 0.0
    for bound, count in counts.items():
        if count >= rank:
            if bound == float("inf"):
                return lower * 1000
            inside = (rank - below) / (count - below) if count > below else 1.0
            return (lower + (bound - lower) * inside) * 1000
        lower, below = bound, count
    return lower * 1000


def _service_url(namespace: str, document: LLMDeployment) -> str:
    return f"{http_scheme(document)}://{http_service(document.metadata.name)}.{namespace}.svc:{http_port(document)}/metrics"
