"""One composition at the gateway: who decides, the experts' state, sessions, and how it stands (request speed).

Nothing that a decision depends on is kept here: experts and sessions are in the directory, so that every replica decides alike.
Must not know: HTTP, gRPC, how the router decides. Belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Literal, TypeVar

from antiphon.coe.routing.decision import Decision, DecisionId, Question, View
from antiphon.coe.routing.router import Record
from antiphon.coe.serving.circuit_breaker import Breaker
from antiphon.coe.serving.combining import Asked
from antiphon.coe.serving.deciders import Routes
from antiphon.coe.serving.expert_health import ExpertHealth
from antiphon.core.directory import Notes
from antiphon.core.document.coe.experts import ExternalEndpoint
from antiphon.core.document.composition import CompositionOfExperts, Policy
from antiphon.core.errors import AntiphonError, InvalidInput
from antiphon.gateway.compositions import CompositionStatus, ExpertStanding

_log = logging.getLogger(__name__)

V = TypeVar("V")

_NOTE_TIMEOUT_S = 0.2  # what looking up or noting a session may cost a request


class Composition:
    """Routes and remembers for one ``coe/<name>``.

    Args:
        document: the composition.
        routes: who decides.
        health: the experts' state.
        notes: where sessions are kept.
        wall_clock: unix seconds.
    """

    def __init__(
        self,
        document: CompositionOfExperts,
        routes: Routes,
        health: ExpertHealth,
        notes: Notes,
        *,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.document = document
        self.routes = routes
        self._health = health
        self._notes = notes
        self._wall_clock = wall_clock
        self._num_fallbacks = 0
        self._last_fallback = ""
        self._asked: OrderedDict[DecisionId, tuple[Asked, ...]] = OrderedDict()
        self._answered: OrderedDict[DecisionId, str] = OrderedDict()
        self.num_running = health.num_running

    @property
    def name(self) -> str:
        """The name that clients send, without a policy."""
        return self.document.model_name

    @property
    def breakers(self) -> dict[str, Breaker]:
        """The circuit of each expert."""
        return self._health.breakers

    def model_of(self, expert: str) -> str:
        """The served model behind an expert of ours."""
        return self._health.model_of(expert)

    def external(self, expert: str) -> ExternalEndpoint | None:
        """The endpoint of an expert that another process answers for, or None when this gateway does."""
        return self._health.external(expert)

    def view(self, avoided: Iterable[str] = ()) -> View:
        """State of every expert now; ``avoided`` ones count as down."""
        return self._health.view(avoided)

    async def route(self, question: Question, avoided: Iterable[str] = ()) -> Record:
        """Decide within the document's time; a decision that takes longer is made without looking at the prompt.

        Raises:
            InvalidInput: no expert can be asked for this.
            Unavailable: none that could serve it is healthy.
        """
        sticky_expert = await self._sticky(question.session)
        record = await self.routes.route(question, self.view(avoided), sticky_expert)
        self._health.expect(record.decision)
        return record

    async def explain(self, decision_id: DecisionId, policy: Policy | None) -> tuple[Record, Decision | None]:
        """The record of a decision, and what another policy would have decided when one is named.

        Raises:
            InvalidInput: there is no record of it.
        """
        return await self.routes.explain(decision_id, policy)

    async def feedback(self, decision_id: DecisionId, score: float, expert: str | None = None) -> None:
        """Note how good the answer was; ``expert`` gave it, None = as far as this gateway knows. Raises like ``explain``."""
        await self.routes.feedback(decision_id, score, expert or self._answered.get(decision_id))

    async def served(self, question: Question, decision_id: DecisionId, expert: str, failures: Iterable[str] = ()) -> None:
        """``expert`` answered, after those who failed: the session goes on there."""
        _keep(self._answered, decision_id, expert, self.document.spec.router.record_decisions)
        if failed := list(failures):
            self._num_fallbacks += 1
            when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._wall_clock()))
            self._last_fallback = f"{when} {expert} for {'; '.join(failed)}"
        if not question.session or not self.document.spec.stickiness.enabled:
            return
        try:
            async with asyncio.timeout(_NOTE_TIMEOUT_S):
                await self._notes.put_note(
                    self._session_topic, _session_key(question.session), expert, self.document.spec.stickiness.ttl_s
                )
        except (AntiphonError, TimeoutError) as error:
            _log.warning("%s: the session's expert could not be noted: %s", self.name, error)

    def note_asked(self, decision_id: DecisionId, asked: tuple[Asked, ...]) -> None:
        """Remember who said what, for as many decisions as the router remembers."""
        _keep(self._asked, decision_id, asked, self.document.spec.router.record_decisions)

    def asked(self, decision_id: DecisionId) -> tuple[Asked, ...]:
        """Who was asked for a decision and what came of each; nobody where one expert answered, or through another gateway."""
        return self._asked.get(decision_id, ())

    def status(self) -> CompositionStatus:
        """How it stands now."""
        spec, view = self.document.spec, self.view()
        experts = tuple(
            ExpertStanding(
                name=expert.name,
                external=expert.external is not None,
                general=expert.name == spec.general,
                state=view.of(expert.name),
            )
            for expert in spec.experts
        )
        down = [expert.name for expert in experts if not expert.state.healthy]
        state: Literal["ready", "degraded", "unavailable"] = "ready" if not down else "degraded"
        if len(down) == len(experts):
            state = "unavailable"
        return CompositionStatus(
            name=self.name,
            state=state,
            message=f"down: {', '.join(down)}" if down else "",
            experts=experts,
            num_fallbacks=self._num_fallbacks,
            last_fallback=self._last_fallback,
        )

    async def refresh(self) -> None:
        """Exchange what is known with the other gateways and routers; called now and then."""
        await self._health.refresh()
        await self.routes.refresh()

    async def close(self) -> None:
        """Give back connections; idempotent."""
        await self.routes.close()

    @property
    def _session_topic(self) -> str:
        return f"coe/{self.document.metadata.name}/sessions"

    async def _sticky(self, session: str) -> str | None:
        if not session or not self.document.spec.stickiness.enabled:
            return None
        try:
            async with asyncio.timeout(_NOTE_TIMEOUT_S):
                expert = await self._notes.note(self._session_topic, _session_key(session))
        except (AntiphonError, TimeoutError) as error:
            _log.warning("%s: the session's expert can't be looked up: %s", self.name, error)
            return None
        return expert if expert in self.breakers else None


def _keep(kept: OrderedDict[DecisionId, V], decision_id: DecisionId, value: V, num_kept: int) -> None:
    kept[decision_id] = value
    while len(kept) > num_kept:
        kept.popitem(last=False)


def _session_key(session: str) -> str:
    """Of equal length whatever clients send."""
    return hashlib.sha256(session.encode(errors="replace")).hexdigest()[:32]


async def explained(
    compositions: Iterable[Composition], decision_id: DecisionId, policy: Policy | None
) -> tuple[Composition, Record, Decision | None]:
    """The composition that made a decision, with the decision.

    Raises:
        InvalidInput: none has a record of it.
    """
    for composition in compositions:
        try:
            record, replayed = await composition.explain(decision_id, policy)
        except InvalidInput:
            continue
        return composition, record, replayed
    raise InvalidInput(f"there is no record of decision {decision_id!r}", "decision_id")
