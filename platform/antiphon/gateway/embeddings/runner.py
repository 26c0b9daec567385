"""One prompt to its vector, over as many workers as it takes (request speed).

    place ─► submit ─► vector
      ▲         │
      └── lost ─┘   nothing was kept, so it is computed anew

Must not know: the doors, texts.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass

from antiphon.core.errors import InternalError, Overloaded, PeerLost, Unavailable
from antiphon.core.ids import WorkerId
from antiphon.core.request import Pooling, Request, RequestId, SamplingParams
from antiphon.gateway.embeddings.request import VectorCall
from antiphon.gateway.routing.engine_client import EngineClient
from antiphon.gateway.routing.picker import RoutePlan
from antiphon.gateway.routing.placement import Placement
from antiphon.gateway.routing.waking import Waking

_log = logging.getLogger(__name__)

MAX_LOSSES = 5
_PAUSE_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Vector:
    """What one prompt gave."""

    values: tuple[float, ...]
    num_tokens: int
    num_cached_tokens: int


@dataclass(slots=True, kw_only=True)
class Progress:
    """Of one request: whether any of its vectors has been made; then waiting is worth more than refusing."""

    has_any: bool = False


class VectorRunner:
    """Belongs to one event loop."""

    def __init__(
        self,
        placement: Placement,
        client: EngineClient,
        waking: Waking,
        clock: Callable[[], float],
        placement_timeout_s: float,
    ) -> None:
        self._placement = placement
        self._client = client
        self._waking = waking
        self._clock = clock
        self._placement_timeout_s = placement_timeout_s

    async def run(
        self, call: VectorCall, token_ids: tuple[int, ...], pooling: Pooling, deadline_s: float, progress: Progress
    ) -> Vector:
        """The vector of one prompt. Leaving early aborts it at the engine.

        Raises:
            AntiphonError: it can't be had.
        """
        excluded: set[WorkerId] = set()
        num_losses = 0
        since_s: float | None = None
        while True:
            placed: WorkerId | None = None
            try:
                plan = await self._place(call, token_ids, excluded, may_wake=since_s is None and not progress.has_any)
                placed = plan.worker
                vector = await self._on(placed, call, token_ids, pooling, deadline_s)
            except (Unavailable, Overloaded) as error:
                now_s = self._clock()
                first, since_s = since_s is None, now_s if since_s is None else since_s
                if placed is not None:
                    excluded.add(placed)
                    _log.warning("request %s: %s", call.request_id, error)
                elif first and not progress.has_any:
                    raise  # refuse early
                else:
                    excluded.clear()
                num_losses += isinstance(error, PeerLost)
                is_busy = isinstance(error, Overloaded) and progress.has_any  # with work of this very request, mostly
                if num_losses >= MAX_LOSSES or (not is_busy and now_s - since_s > self._placement_timeout_s):
                    raise
                await asyncio.sleep(_PAUSE_S)  # the request's deadline ends it at the latest
            else:
                progress.has_any = True
                return vector

    async def _place(self, call: VectorCall, token_ids: tuple[int, ...], excluded: set[WorkerId], *, may_wake: bool) -> RoutePlan:
        """A plan; of a pool that sleeps, the one that there is once a worker is ready. Raises Unavailable, Overloaded."""
        timeout_s = self._waking.timeout_s(call.model) if may_wake else 0.0
        end_s = self._clock() + timeout_s
        try:
            return self._placement.place(call.model, token_ids, salt=call.cache_salt, tenant=call.tenant, excluded=excluded)
        except Unavailable:
            if timeout_s <= 0:
                raise
        with self._waking.hold(call.model):
            while True:
                await asyncio.sleep(_PAUSE_S)
                try:
                    return self._placement.place(call.model, token_ids, salt=call.cache_salt, tenant=call.tenant, excluded=excluded)
                except Unavailable:
                    if self._clock() >= end_s:
                        raise

    async def _on(
        self, worker: WorkerId, call: VectorCall, token_ids: tuple[int, ...], pooling: Pooling, deadline_s: float
    ) -> Vector:
        request = Request(
            request_id=RequestId(f"{call.request_id}/{secrets.token_hex(6)}"),
            prompt_token_ids=token_ids,
            sampling=SamplingParams(max_tokens=1, temperature=0.0, pooling=pooling),
            priority=call.priority,
            traceparent=call.traceparent,
            cache_salt=call.cache_salt,
            tenant=call.tenant,
        )
        streaming = self._client.stream(
            worker, request, deadline_left_s=deadline_s - self._clock(), connect_timeout_s=self._placement_timeout_s
        )
        async with aclosing(streaming) as answers:
            async for answer in answers:
                if answer.output.finish_reason is None:
                    continue
                if not answer.output.vector:
                    raise InternalError(f"{worker} answered without a vector: it is of a version that has none")
                return Vector(
                    values=answer.output.vector,
                    num_tokens=len(token_ids),
                    num_cached_tokens=answer.output.num_cached_tokens,
                )
        raise Unavailable(f"{worker} ended the request without a reason")
