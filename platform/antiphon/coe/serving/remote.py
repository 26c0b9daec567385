"""Asks router replicas, one after the other, until one has decided (request speed).

    replicas of the directory ─► the next in turn ── lost or late ─► another ── none left ─► decided here without a judgement

A replica that failed is asked last for a while, and what a decision can't be is no decision. So a router that dies, stands still or
is of another document costs a request one more question, and the death of all routers costs quality, not requests. Must not know:
HTTP, how a router decides.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from antiphon.coe.routing.decision import Decision, DecisionId, Question, View
from antiphon.coe.routing.router import Record, Router
from antiphon.coe.serving.wire import request_of, taken
from antiphon.core.directory import Notes
from antiphon.core.document.composition import CompositionOfExperts, Policy
from antiphon.core.errors import (
    AlreadyRated,
    AntiphonError,
    Cancelled,
    CorruptMessage,
    DeadlineExceeded,
    InternalError,
    Unavailable,
    UnknownModel,
)
from antiphon.rpc.router.client import RouterCalls
from antiphon.rpc.v1 import router_pb2 as pb

_log = logging.getLogger(__name__)

_SHUNNED_S = 1.0  # a replica that failed is asked last for so long
_TIMEOUT_FACTOR = 2.0  # a router answers within the document's time; the way there and back takes some too
_UNARY_TIMEOUT_S = 2.0
_MAX_REPLICAS = 64  # that are connected to, whatever stands in the directory
# UnknownModel: a router that has not been told of the composition yet. CorruptMessage: one that has another idea of it.
_LOST = (Unavailable, DeadlineExceeded, Cancelled, InternalError, UnknownModel, CorruptMessage)


def routers_topic(composition: str) -> str:
    """Where the replicas of a composition's router note their addresses."""
    return f"coe/{composition}/routers"


class RemoteRoutes:
    """The router replicas of one composition. Belongs to one event loop.

    Args:
        document: the composition.
        notes: where replicas register.
        avoided: experts that this gateway can't reach now.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        document: CompositionOfExperts,
        notes: Notes,
        *,
        avoided: Callable[[], frozenset[str]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model = document.model_name
        self._spec = document.spec
        self._topic = routers_topic(document.metadata.name)
        self._notes = notes
        self._avoided = avoided
        self._clock = clock
        self._timeout_s = document.spec.router.timeout_s * _TIMEOUT_FACTOR
        self._alone = Router(document.spec, None, replica=f"gateway-{secrets.token_hex(16)}")
        self._calls: dict[str, RouterCalls] = {}
        self._shunned: dict[str, float] = {}
        self._turns = itertools.count()
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def num_replicas(self) -> int:
        """Routers that are registered now."""
        return len(self._calls)

    async def route(self, question: Question, view: View, sticky_expert: str | None) -> Record:
        """See ``Routes``. ``view`` and ``sticky_expert`` serve only where no router is left; routers have their own."""
        request = request_of(self._model, question, self._avoided())
        end_s = self._clock() + self._timeout_s  # the first may take all of it; who is quick to fail leaves it to the next
        for address in self._order():
            began_s = self._clock()
            if began_s >= end_s:
                break
            try:
                answer = await self._calls[address].route(request, self._timeout_s)
                asked = replace(question, prompt="")
                return taken(answer, asked, self._spec, decided_s=time.time(), took_s=self._clock() - began_s)
            except (*_LOST, KeyError) as error:
                self._shunned[address] = self._clock()
                _log.warning("router %s of %s: %s", address, self._model, error)
        return self._alone.without_judgement(question, view, sticky_expert)

    async def explain(self, decision_id: DecisionId, policy: Policy | None) -> tuple[Record, Decision | None]:
        """See ``Routes``."""
        request = pb.ExplainRequest(decision_id=decision_id, policy="" if policy is None else policy)
        for address in self._order():
            try:
                answer = await self._calls[address].explain(request, _UNARY_TIMEOUT_S)
                made = {"decided_s": answer.decided_s, "took_s": answer.took_s}
                record = taken(answer.decision, Question(prompt=""), self._spec, **made)
                if not answer.HasField("replay"):
                    return record, None
                return record, taken(answer.replay, Question(prompt=""), self._spec, **made).decision
            except (AntiphonError, KeyError):
                continue  # another replica may have decided
        record = self._alone.explain(decision_id)
        return record, None if policy is None else self._alone.replay(decision_id, policy)

    async def feedback(self, decision_id: DecisionId, score: float, expert: str | None) -> None:
        """See ``Routes``."""
        for address in self._order():
            try:
                request = pb.FeedbackRequest(decision_id=decision_id, score=score, expert=expert or "")
                await self._calls[address].feedback(request, _UNARY_TIMEOUT_S)
            except AlreadyRated:
                raise
            except (AntiphonError, KeyError):
                continue
            return
        self._alone.feedback(decision_id, score, expert)

    async def refresh(self) -> None:
        """See ``Routes``: which replicas there are."""
        try:
            found: Mapping[str, str] = await self._notes.notes(self._topic)
        except AntiphonError:
            return  # those that are known may still be there
        wanted = set(sorted(found.values())[:_MAX_REPLICAS])
        for address in wanted - self._calls.keys():
            self._calls[address] = RouterCalls(address)
        for address in self._calls.keys() - wanted:
            self._shunned.pop(address, None)
            task = asyncio.create_task(self._calls.pop(address).close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """See ``Routes``."""
        calls, self._calls = list(self._calls.values()), {}
        await asyncio.gather(*(call.close() for call in calls), *self._closing, return_exceptions=True)

    def _order(self) -> list[str]:
        """All replicas: the healthy ones from the next in turn on, then those that failed a moment ago."""
        addresses = sorted(self._calls)
        if not addresses:
            return []
        start = next(self._turns) % len(addresses)
        turned = addresses[start:] + addresses[:start]
        now_s = self._clock()
        return sorted(turned, key=lambda address: now_s - self._shunned.get(address, -_SHUNNED_S) < _SHUNNED_S)
