"""Who decides for a composition: the seam, and the router in this process (request speed).

Must not know: which expert answers, HTTP.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from antiphon.coe.routing.decision import Decision, DecisionId, Question, View
from antiphon.coe.routing.router import Record, Router
from antiphon.core.document.composition import Policy


class Routes(Protocol):
    """Decides and remembers. Errors are those of ``coe.routing.router.Router``."""

    async def route(self, question: Question, view: View, sticky_expert: str | None) -> Record:
        """Decide within the document's time; one that takes longer is made without looking at the prompt."""
        ...

    async def explain(self, decision_id: DecisionId, policy: Policy | None) -> tuple[Record, Decision | None]:
        """The record of a decision, and what another policy would have decided when one is named."""
        ...

    async def feedback(self, decision_id: DecisionId, score: float, expert: str | None) -> None:
        """Note how good an answer was, 0..1; ``expert`` gave it, None = the one that was decided for."""
        ...

    async def refresh(self) -> None:
        """Look for what has changed around it; called now and then."""
        ...

    async def close(self) -> None:
        """Give back connections; idempotent."""
        ...


class LocalRoutes:
    """The router of this process. Judging that takes longer than a change of threads runs on one, so that it delays no token."""

    def __init__(self, router: Router) -> None:
        self.router = router

    async def route(self, question: Question, view: View, sticky_expert: str | None) -> Record:
        """See ``Routes``."""
        router = self.router
        if router.is_quick(question):
            return router.route(question, view, sticky_expert)
        try:
            async with asyncio.timeout(router.spec.router.timeout_s):
                record = await asyncio.to_thread(router.route, question, view, sticky_expert)
        except TimeoutError:
            record = router.without_judgement(question, view, sticky_expert)
        return record

    async def explain(self, decision_id: DecisionId, policy: Policy | None) -> tuple[Record, Decision | None]:
        """See ``Routes``."""
        record = self.router.explain(decision_id)
        return record, None if policy is None else self.router.replay(decision_id, policy)

    async def feedback(self, decision_id: DecisionId, score: float, expert: str | None) -> None:
        """See ``Routes``."""
        self.router.feedback(decision_id, score, expert)

    async def refresh(self) -> None:
        """See ``Routes``."""

    async def close(self) -> None:
        """See ``Routes``."""
