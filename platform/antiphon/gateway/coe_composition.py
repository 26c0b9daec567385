"""One composition at the gateway: router, sessions, circuits, and the view the router decides on (request speed).

Health and queues of our own experts come from the directory, so that all gateways decide alike; external ones have no record
there and are known by their circuit. Must not know: HTTP. Belongs to one event loop.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping

from antiphon.coe.decision import DecisionId, ExpertState, Question, View
from antiphon.coe.router import Record, Router
from antiphon.core.composition import POLICIES, CompositionOfExperts, ExternalEndpoint, Policy
from antiphon.core.errors import InvalidInput
from antiphon.core.worker_info import WorkerInfo
from antiphon.gateway.coe_breaker import Breaker

TURN_S = 1.0  # nominal time in which a running request makes room for a waiting one
MAX_SESSIONS = 100_000


class Composition:
    """Routes and remembers for one ``coe/<name>``.

    Args:
        document: the composition.
        router: its router.
        models: served model name of each expert that is ours, by expert.
        endpoints: experts that are ours but reached at another gateway, by expert.
        workers: what the directory lists now.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        document: CompositionOfExperts,
        router: Router,
        *,
        models: Mapping[str, str],
        endpoints: Mapping[str, ExternalEndpoint],
        workers: Callable[[], Iterable[WorkerInfo]],
        clock: Callable[[], float],
    ) -> None:
        self.document = document
        self.router = router
        self._models = models
        self._endpoints = endpoints
        self._workers = workers
        self._clock = clock
        limits = document.spec.limits
        self.breakers = {
            expert.name: Breaker(limits.breaker_failures, limits.breaker_open_s, clock) for expert in document.spec.experts
        }
        self.num_running = dict.fromkeys(self.breakers, 0)
        self._sessions: OrderedDict[str, tuple[str, float]] = OrderedDict()

    @property
    def name(self) -> str:
        """The name that clients send, without a policy."""
        return self.document.model_name

    def model_of(self, expert: str) -> str:
        """The served model behind an expert of ours."""
        return self._models[expert]

    def external(self, expert: str) -> ExternalEndpoint | None:
        """The endpoint of an expert that another process answers for, or None when this gateway does."""
        return self._endpoints.get(expert, self.document.spec.expert(expert).external)

    def view(self) -> View:
        """State of every expert now."""
        workers = list(self._workers())
        states = {}
        for expert in self.document.spec.experts:
            state = ExpertState() if self.external(expert.name) is not None else _state(self._models[expert.name], workers)
            closed = not self.breakers[expert.name].is_open
            states[expert.name] = state if closed else ExpertState(healthy=False)
        return View(experts=states)

    async def route(self, question: Question) -> Record:
        """Decide within the document's time; a decision that takes longer is made without looking at the prompt.

        Raises:
            InvalidInput: no expert can be asked for this.
            Unavailable: none that could serve it is healthy.
        """
        view, sticky = self.view(), self._sticky(question.session)
        try:
            async with asyncio.timeout(self.document.spec.router.timeout_s):
                record = await asyncio.to_thread(self.router.route, question, view, sticky)
        except TimeoutError:
            record = self.router.without_judgement(question, view, sticky)
        return record

    def served(self, question: Question, expert: str) -> None:
        """``expert`` answered: the session goes on there."""
        if not question.session or not self.document.spec.stickiness.enabled:
            return
        self._sessions[question.session] = (expert, self._clock())
        self._sessions.move_to_end(question.session)
        while len(self._sessions) > MAX_SESSIONS:
            self._sessions.popitem(last=False)

    def _sticky(self, session: str) -> str | None:
        expert, seen_s = self._sessions.get(session, ("", 0.0))
        if not session or not expert or self._clock() - seen_s > self.document.spec.stickiness.ttl_s:
            return None
        return expert


def policy_named(text: str) -> Policy:
    """A policy by its name.

    Raises:
        InvalidInput: there is no such policy.
    """
    for policy in POLICIES:
        if text == policy:
            return policy
    raise InvalidInput(f"policy must be one of {', '.join(POLICIES)}", "policy")


def holder_of(compositions: Iterable[Composition], decision_id: DecisionId) -> Composition:
    """The composition that made a decision.

    Raises:
        InvalidInput: none has a record of it.
    """
    for composition in compositions:
        try:
            composition.router.explain(decision_id)
        except InvalidInput:
            continue
        return composition
    raise InvalidInput(f"there is no record of decision {decision_id!r}", "decision_id")


def _state(model: str, workers: list[WorkerInfo]) -> ExpertState:
    able = [w for w in workers if w.model == model and w.role.generates and w.ready and not w.draining]
    if not able:
        return ExpertState(healthy=False)
    num_waiting = sum(worker.load.num_waiting for worker in able)
    num_slots = sum(max(1, worker.max_num_seqs) for worker in able)
    return ExpertState(num_waiting=num_waiting, expected_wait_s=TURN_S * num_waiting / num_slots)
