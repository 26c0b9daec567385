"""Which experts are asked for one request, one after the other, until one has begun to answer (request speed).

    chosen expert ── refused, failed or silent before its first word ──► next alternative whose circuit is closed ──► ... ──► nobody
          └── has begun: what a client has seen is never taken back

One loop for every door: the doors differ only in how they ask an expert. Must not know: HTTP, gRPC, how the router decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from antiphon.coe.routing.decision import Question
from antiphon.coe.routing.router import Record
from antiphon.coe.serving.circuit_breaker import Breaker
from antiphon.coe.serving.composition import Composition
from antiphon.core.document.coe.experts import ExternalEndpoint
from antiphon.core.errors import Overloaded, Unavailable

PLACEMENT_TIMEOUT_S = 0.5  # how long a lost worker of an expert is waited for while other experts can answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One expert's try at a request."""

    expert: str
    endpoint: ExternalEndpoint | None  # None = it is served here
    last: bool  # nobody comes after it, so that its refusal is the answer, too

    @property
    def placement_timeout_s(self) -> float | None:
        """How long a worker of it may be waited for; None = as long as the gateway waits for any."""
        return None if self.last else PLACEMENT_TIMEOUT_S


class Fallback:
    """The turns of one request. Belongs to one task."""

    def __init__(self, composition: Composition, question: Question, record: Record) -> None:
        self._composition = composition
        self._question = question
        self._decision = record.decision
        self._decision_id = record.decision_id
        self.failures: list[str] = []  # "expert: why", in order

    def turns(self) -> Iterator[Turn]:
        """The experts to ask: the chosen one whatever its circuit says; an expert named by the client has no alternatives."""
        others = () if self._question.expert is not None else self._decision.alternatives
        experts = (self._decision.expert, *others)
        for index, expert in enumerate(experts):
            if index and self._composition.breakers[expert].is_open:
                continue
            yield Turn(expert=expert, endpoint=self._composition.external(expert), last=index == len(experts) - 1)

    @contextmanager
    def asking(self, turn: Turn) -> Iterator[Breaker]:
        """Count a request at the turn's expert while it runs; the caller tells the circuit how it went.

        Raises:
            Overloaded: as many requests as the document allows are at this external expert already.
        """
        running, limits = self._composition.num_running, self._composition.document.spec.limits
        if turn.endpoint is not None and running[turn.expert] >= limits.max_concurrent_per_expert:
            raise Overloaded(f"{running[turn.expert]} requests are at expert {turn.expert} already", retry_after_s=1.0)
        breaker = self._composition.breakers[turn.expert]
        breaker.begin()
        running[turn.expert] += 1
        try:
            yield breaker
        finally:
            running[turn.expert] -= 1

    def failed(self, turn: Turn, why: str) -> None:
        """The expert did not begin to answer."""
        self.failures.append(f"{turn.expert}: {why}")

    async def answered(self, turn: Turn) -> None:
        """The expert answered: the session goes on there."""
        await self._composition.served(self._question, self._decision_id, turn.expert, self.failures)

    def nobody(self) -> Unavailable:
        """What to say when no turn is left."""
        return Unavailable("no expert could answer (" + "; ".join(self.failures) + ")")
