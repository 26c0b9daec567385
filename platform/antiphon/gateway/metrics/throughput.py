"""A line now and then about what a gateway does: tokens per second, requests, queues, KV use (control speed).

Only while there is something to tell. Must not know: where logs go.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from antiphon.core.worker_info import WorkerInfo
from antiphon.gateway.metrics.instruments import kv_usage

_log = logging.getLogger(__name__)

INTERVAL_S = 10.0
MESSAGE = "throughput"  # of the record; its fields are a Throughput's


@dataclass(slots=True)
class Totals:
    """What was done since the gateway's start. Belongs to its event loop."""

    num_prompt_tokens: int = 0
    num_generation_tokens: int = 0
    num_requests: int = 0
    num_failed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """One interval."""

    prompt_tokens_per_s: float
    generation_tokens_per_s: float
    requests_per_s: float
    failed: int
    active: int
    waiting: int
    running: int
    kv_usage: float


def between(before: Totals, now: Totals, seconds: float, *, active: int, workers: Sequence[WorkerInfo]) -> Throughput:
    """What happened from one look to the next."""
    generating = [info for info in workers if info.role.generates]
    return Throughput(
        prompt_tokens_per_s=round((now.num_prompt_tokens - before.num_prompt_tokens) / seconds, 1),
        generation_tokens_per_s=round((now.num_generation_tokens - before.num_generation_tokens) / seconds, 1),
        requests_per_s=round((now.num_requests - before.num_requests) / seconds, 2),
        failed=now.num_failed - before.num_failed,
        active=active,
        waiting=sum(info.load.num_waiting for info in generating),
        running=sum(info.load.num_running for info in generating),
        kv_usage=round(max(map(kv_usage, generating), default=0.0), 3),
    )


async def tell(
    totals: Callable[[], Totals],
    active: Callable[[], int],
    workers: Callable[[], Sequence[WorkerInfo]],
    interval_s: float = INTERVAL_S,
) -> None:
    """Log an interval after the other, for ever; idle ones after the first are left out."""
    loop = asyncio.get_running_loop()
    before, then_s, was_idle = totals(), loop.time(), True
    while True:
        await asyncio.sleep(interval_s)
        now, now_s = totals(), loop.time()
        idle = now == before and not active()
        if not (idle and was_idle):
            found = between(before, now, now_s - then_s, active=active(), workers=workers())
            fields = {name: getattr(found, name) for name in Throughput.__slots__}
            _log.info(MESSAGE, extra=fields)
        before, then_s, was_idle = now, now_s, idle
