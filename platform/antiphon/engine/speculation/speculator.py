"""Speculation of one engine: which drafts its next step verifies, and what is learned from what became of them (step speed).

    schedule:  plan(decodes) ──► drafts ──► rows of the step        update:  note(tokens) ──► acceptance, step cost

Drafts go to decodes of steps that hold nothing else: beside a prompt's chunk, the chunk's rows decide what the step costs.
Proposals that cost nothing are made at every step, and where their drafts are not used the first is compared with the token that
came: what a request would accept is known without spending a row on it. Proposals that cost something are timed apart from the
step that verifies them. Must not know: blocks, queues, who computes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from antiphon.core.request import RequestId
from antiphon.engine.speculation.controller import Acceptance, DraftingCosts, RequestAcceptance, StepCosts, choose
from antiphon.engine.speculation.drafter import DraftAsked, Drafter, Proposal

_FIRST_TRIAL, _LAST_TRIAL = 8, 512  # steps between trials of a drafter whose drafts don't pay; doubled after each that failed

logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class SpeculationStats:
    """Since start."""

    num_verifications: int = 0  # steps of requests that had drafts
    num_drafts: int = 0
    num_taken: int = 0


@dataclass(slots=True)
class _Request:
    acceptance: RequestAcceptance = field(default_factory=RequestAcceptance)
    proposal: Proposal | None = None  # for the step under way
    num_used: int = 0  # drafts of it
    idle_steps: int = 0  # since the last draft, where proposals cost something
    trial_after: int = _FIRST_TRIAL


class Speculator:
    """Belongs to the engine's loop.

    Args:
        drafter: proposes.
        max_drafts: of one request in one step.
        clock: seconds; the scheduler's.
    """

    def __init__(self, drafter: Drafter, *, max_drafts: int, clock: Callable[[], float]) -> None:
        self.drafter = drafter
        self.stats = SpeculationStats()
        self._max_drafts = max_drafts
        self._clock = clock
        self._costs = StepCosts()
        self._drafting = DraftingCosts()
        self._has_failed = False
        self._drafting_s = 0.0  # of the step under way, spent on proposals that aren't free
        self._acceptance = Acceptance(drafter.priors)
        self._requests: dict[RequestId, _Request] = {}
        self._start_s = 0.0
        self._num_rows = 0  # of the step under way; 0 = nothing is learned of what it costs

    def begin(self) -> None:
        """A step begins to be scheduled."""
        self._start_s = self._clock()
        self._drafting_s = 0.0
        self._num_rows = 0

    def plan(self, asked: Mapping[RequestId, DraftAsked], num_rows: int, room: int) -> dict[RequestId, tuple[int, ...]]:
        """Drafts for a step of ``num_rows`` decodes, of those in ``asked``, of ``room`` rows at most."""
        self._num_rows = num_rows
        wanted = {
            request_id: replace(each, num_drafts=min(each.num_drafts, self._max_drafts))
            for request_id, each in asked.items()
            if each.num_drafts > 0
        }
        if not wanted or room <= 0:
            return {}
        return self._plan_free(wanted, num_rows, room) if self.drafter.is_free else self._plan_costly(wanted, num_rows, room)

    def _plan_free(self, wanted: Mapping[RequestId, DraftAsked], num_rows: int, room: int) -> dict[RequestId, tuple[int, ...]]:
        proposals = self.drafter.propose(wanted)
        counts = self._counts(list(proposals), list(proposals.values()), num_rows, room)
        drafts: dict[RequestId, tuple[int, ...]] = {}
        for (request_id, proposal), count in zip(proposals.items(), counts, strict=True):
            request = self._requests[request_id]
            request.proposal, request.num_used = proposal, count
            if count:
                drafts[request_id] = proposal.token_ids[:count]
        return drafts

    def _plan_costly(self, wanted: Mapping[RequestId, DraftAsked], num_rows: int, room: int) -> dict[RequestId, tuple[int, ...]]:
        nothing = [Proposal(token_ids=(0,) * each.num_drafts) for each in wanted.values()]
        counts = self._counts(list(wanted), nothing, num_rows, room)
        for place, request_id in enumerate(wanted):
            request = self._requests[request_id]
            request.idle_steps = 0 if counts[place] else request.idle_steps + 1
            if request.idle_steps >= request.trial_after and sum(counts) < room:
                counts[place], request.idle_steps = 1, 0
                request.trial_after = min(_LAST_TRIAL, 2 * request.trial_after)
        given = {
            request_id: replace(each, num_drafts=count)
            for (request_id, each), count in zip(wanted.items(), counts, strict=True)
            if count
        }
        proposals = self._propose_timed(given) if given else {}
        for request_id, proposal in proposals.items():
            request = self._requests[request_id]
            request.proposal, request.num_used = proposal, len(proposal.token_ids)
        return {request_id: proposal.token_ids for request_id, proposal in proposals.items() if proposal.token_ids}

    def _propose_timed(self, given: Mapping[RequestId, DraftAsked]) -> Mapping[RequestId, Proposal]:
        if self._has_failed:
            return {}
        start_s = self._clock()
        try:
            proposals = self.drafter.propose(given)
        except Exception:  # drafts are no answers: serving goes on without them
            logger.exception("the drafter %s has failed; no more is drafted here", self.drafter.name)
            self._has_failed = True
            return {}
        self._drafting_s = self._clock() - start_s
        depth = max((len(proposal.token_ids) for proposal in proposals.values()), default=0)
        if depth:  # a drafter that only caught up says nothing of what drafts cost
            self._drafting.note(depth, self._drafting_s)
        return proposals

    def _counts(self, ids: Sequence[RequestId], proposals: Sequence[Proposal], num_rows: int, room: int) -> list[int]:
        shares = []
        for request_id, proposal in zip(ids, proposals, strict=True):
            request = self._requests.get(request_id)
            if request is None:
                request = self._requests[request_id] = _Request()
            shares.append([self._acceptance.share(each, request.acceptance) for each in _confidences(proposal)])
        if self.drafter.is_free:
            return choose(self._costs.estimate, num_rows, shares, room)
        step_s = self._costs.estimate(1)
        return choose(self._costs.estimate, num_rows, shares, room, lambda depth: self._drafting.estimate(depth, step_s))

    def withdraw(self, request_id: RequestId) -> None:
        """The request's drafts were not scheduled after all."""
        self._requests[request_id].num_used = 0

    def note(self, tokens: Mapping[RequestId, Sequence[int]], num_drafts: int) -> None:
        """The step that was planned is over: what it drew, and how many drafts it had."""
        if self._num_rows and tokens:
            self._costs.note(self._num_rows + num_drafts, self._clock() - self._start_s - self._drafting_s)
        for request_id, drawn in tokens.items():
            request = self._requests.get(request_id)
            if request is None or request.proposal is None:
                continue
            proposal, used = request.proposal, request.num_used
            request.proposal, request.num_used = None, 0
            if used:
                num_taken = min(used, len(drawn) - 1)
                self.stats.num_verifications += 1
                self.stats.num_drafts += used
                self.stats.num_taken += num_taken
                self._acceptance.note(_confidences(proposal)[:used], request.acceptance, num_taken=num_taken)
                if num_taken:
                    request.trial_after = _FIRST_TRIAL
            elif drawn and proposal.token_ids:
                num_taken = int(drawn[0] == proposal.token_ids[0])
                self._acceptance.note(_confidences(proposal)[:1], request.acceptance, num_taken=num_taken)

    def forget(self, request_id: RequestId) -> None:
        """The request has ended; unknown ids are ignored."""
        self._requests.pop(request_id, None)
        self.drafter.forget(request_id)


def _confidences(proposal: Proposal) -> Sequence[int]:
    return proposal.confidences or (0,) * len(proposal.token_ids)
