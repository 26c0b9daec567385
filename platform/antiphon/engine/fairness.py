"""Whose turn it is: waiting requests in queues by tenant, the least served tenant first (step speed; no clock, no I/O).

    counters  tenant → tokens served: prompt tokens when one of its requests is admitted, output tokens (twice) as they are sampled
    next      the queue with the smallest counter; within it the order of (priority, arrival)
    return    a tenant whose queue was empty starts at the smallest counter that waits, so that idling saves nothing up

These are virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024, algorithm 2, its weights 1
and 2). Beyond the paper, a tenant with far fewer places in the batch than another takes one of them, since places of long answers
would else be held for minutes. A light one, that was lately served clearly less than its share, waits for none of them,
since what it asks for is within its share over a while: it is first in turn, takes as many places as it asks for, and its prompts
have their steps before others' prompts. And the tokens of a step that prompts may have are divided (``PromptShares``), since long
prompts in chunks would else keep everybody out until they are computed. Requests without a tenant are one tenant's: where nobody
has a name, this is one queue. Must not know: blocks.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import partial
from typing import Final

from antiphon.core.request import RequestId, RequestStatus
from antiphon.engine.request_state import RequestState

OUTPUT_WEIGHT: Final = 2
_MAX_IDLE: Final = 4096  # tenants without a request whose counters are remembered
_LATELY: Final = 65536.0  # tokens served while somebody waited, until one counts half of what it did
# Of an equal share of what was served lately: whoever has less is light. Below 1 by more than chance makes between tenants that
# ask for all they can get, since requests are served whole: these are equals.
_LIGHT: Final = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadyTurn:
    """A request that gets a place now."""

    state: RequestState
    giver: RequestState | None  # whose place; None = one is free


class FairQueue:
    """Waiting requests of one engine. Only the scheduler may touch it."""

    def __init__(self) -> None:
        self._queues: dict[str, list[RequestState]] = {}  # none is empty
        self._counters: dict[str, float] = {}
        self._last = 0.0  # counter of the tenant that left last
        self._served = 0.0  # to all tenants
        self._lately: dict[
            str, tuple[float, float]
        ] = {}  # of the counters' tenants: tokens, and ``_served`` when they were counted
        self._size = 0
        self.light: AbstractSet[str] = frozenset()  # tenants, when last looked at

    def __len__(self) -> int:
        return self._size

    def look(self, running: Sequence[RequestState]) -> None:
        """See who is light now, for a step."""
        self.light = self._light({*self._queues, *(state.request.tenant for state in running)})

    def add(self, state: RequestState) -> None:
        """Let a request wait."""
        tenant = state.request.tenant
        if tenant not in self._queues:
            waiting = [self._counters[each] for each in self._queues]
            self._counters[tenant] = max(self._counters.pop(tenant, 0.0), min(waiting, default=self._last))
            self._queues[tenant] = []
            self._forget_idle()
        bisect.insort(self._queues[tenant], state, key=_order)
        self._size += 1

    def head(self) -> RequestState:
        """The request whose turn it is; there is one."""
        return min((queue[0] for queue in self._queues.values()), key=self._turn)

    def heads(self) -> list[RequestState]:
        """Every tenant's first, in order of turns."""
        return sorted((queue[0] for queue in self._queues.values()), key=self._turn)

    def newcomers(self, running: Sequence[RequestState], num_places: int) -> list[RequestState]:
        """The tenants' first that a batch of ``num_places`` could take now, if only by an exchange of places."""
        if len(running) < num_places:
            return self.heads()
        places, light = self._places(running)
        return [head for head in self.heads() if _giver(running, places, light, head.request.tenant, ()) is not None]

    def exchange(self, running: Sequence[RequestState], kept: Iterable[str]) -> tuple[RequestState, RequestState] | None:
        """Whose turn comes by taking a place, and whose place; None where nobody holds more than its share."""
        places, light = self._places(running)
        for state in self.heads():
            victim = _giver(running, places, light, state.request.tenant, kept)
            if victim is not None:
                return state, victim
        return None

    def next_ready(
        self, ready: Sequence[RequestState], running: Sequence[RequestState], kept: Iterable[str], *, is_full: bool
    ) -> ReadyTurn | None:
        """Whose turn it is of requests that need nothing but a place, and no longer wait here; None = nobody's.

        Args:
            ready: these requests.
            running: the batch.
            kept: ids of requests that stay in it.
            is_full: whether a place has to be somebody's.
        """
        places, light = self._places(running, ready)
        for state in sorted(ready, key=partial(self._turn, light=light)):
            giver = _giver(running, places, light, state.request.tenant, kept) if is_full else None
            if giver is not None or not is_full:
                return ReadyTurn(state=state, giver=giver)
        return None

    def has_light(self, running: Sequence[RequestState], ready: Sequence[RequestState]) -> bool:
        """Whether a light tenant's request waits here."""
        _, light = self._places(running, ready)
        return not light.isdisjoint(self._queues)

    def take(self, state: RequestState, num_tokens: int) -> None:
        """It is served now, with so many tokens of its prompt to compute."""
        self.remove(state)
        self._count(state.request.tenant, num_tokens)

    def remove(self, state: RequestState) -> None:
        """It waits no longer."""
        tenant = state.request.tenant
        queue = self._queues[tenant]
        queue.remove(state)
        self._size -= 1
        if not queue:
            del self._queues[tenant]
            self._last = self._counters[tenant]

    def sampled(self, tenant: str) -> None:
        """One of its requests got a token."""
        if tenant in self._counters:
            self._count(tenant, OUTPUT_WEIGHT)

    def to_give_way(self, tenant: str) -> RequestState | None:
        """Who leaves a full queue for a newcomer of ``tenant``: the last of whoever has most, if that is more than the newcomer's.

        Never one that has begun to be served.
        """
        longest = max(self._queues, key=lambda each: len(self._queues[each]), default=tenant)
        if len(self._queues.get(longest, ())) <= len(self._queues.get(tenant, ())) + 1:
            return None
        return next(
            (s for s in reversed(self._queues[longest]) if s.status is RequestStatus.WAITING and s.scheduled_s is None), None
        )

    def _places(self, running: Sequence[RequestState], ready: Sequence[RequestState] = ()) -> tuple[Counter[str], AbstractSet[str]]:
        """Places by tenant, and the light tenants, of those who wait, run, or are ready to."""
        places = Counter(state.request.tenant for state in running)
        return places, self._light({*self._queues, *places, *(state.request.tenant for state in ready)})

    def _light(self, tenants: AbstractSet[str]) -> AbstractSet[str]:
        """Of these, who was served clearly less than an equal share lately."""
        if len(tenants) < 2:
            return frozenset()
        lately = {each: self._served_lately(each) for each in tenants}
        least = _LIGHT * sum(lately.values())
        return {each for each, served in lately.items() if served * len(lately) < least}

    def _served_lately(self, tenant: str) -> float:
        num_tokens, at = self._lately.get(tenant, (0.0, 0.0))
        return float(num_tokens * 0.5 ** ((self._served - at) / _LATELY))

    def _count(self, tenant: str, num_tokens: float) -> None:
        self._counters[tenant] += num_tokens
        if not self._queues:  # what nobody waited for was taken from nobody
            return
        served = self._served_lately(tenant) + num_tokens
        self._served += num_tokens
        self._lately[tenant] = served, self._served

    def _turn(self, state: RequestState, light: AbstractSet[str] | None = None) -> tuple[bool, float, int, float]:
        tenant = state.request.tenant
        return tenant not in (self.light if light is None else light), self._counters.get(tenant, 0.0), *_order(state)

    def _forget_idle(self) -> None:
        """Of too many idle tenants those are forgotten who came back least lately."""
        if len(self._counters) > _MAX_IDLE + len(self._queues):
            idle = next(each for each in self._counters if each not in self._queues)
            del self._counters[idle]
            self._lately.pop(idle, None)


class PromptShares:
    """What each tenant's prompts in the batch may have of a step: equal parts, and what one does not need is the others' (max-min).

    One token of each request that decodes is set aside first, and the part of tenants whose first prompt waits to be let in. Where
    a light tenant has a prompt, the step is for light tenants' prompts alone, so that it is no longer than theirs make it.
    """

    def __init__(self, running: Sequence[RequestState], queue: FairQueue, *, budget: int, num_places: int) -> None:
        """``budget``: tokens of the step. ``num_places``: of the batch."""
        queue.look(running)
        needs: Counter[str] = Counter()
        for state in running:
            num_tokens = state.num_tokens_to_compute
            if num_tokens > 1:
                needs[state.request.tenant] += num_tokens
            else:
                budget -= num_tokens
        if len(queue) and (needs or queue.light):
            for head in queue.newcomers(running, num_places):
                needs[head.request.tenant] += len(head.token_ids)
        self._needs, self._budget = needs, max(1, budget)
        self._first: AbstractSet[str] = queue.light & needs.keys()
        self._left: dict[str, int] = {}
        self._share(Counter({tenant: need for tenant, need in needs.items() if tenant in self._first}) if self._first else needs)

    def _share(self, needs: Counter[str]) -> None:
        left = self._budget
        for number, (tenant, need) in enumerate(sorted(needs.items(), key=lambda item: item[1])):
            self._left[tenant] = min(need, -(-left // (len(needs) - number)))
            left -= self._left[tenant]

    def take(self, state: RequestState) -> int:
        """How many tokens a running request computes now."""
        wanted = state.num_tokens_to_compute
        if wanted <= 1:
            return wanted
        tenant = state.request.tenant
        num_tokens = min(wanted, self._left.get(tenant, 0))
        if num_tokens:
            self._left[tenant] -= num_tokens
        return num_tokens

    def open_up(self, running: Sequence[RequestState], num_tokens: Mapping[RequestId, int]) -> bool:
        """Whether the step was kept for prompts of which none has a part in it, for want of a place or blocks; now all can.

        Args:
            running: the batch as it is by now.
            num_tokens: of the step so far.
        """
        if not self._first or any(
            state.request.tenant in self._first and num_tokens.get(state.request_id, 0) > 1 for state in running
        ):
            return False
        self._first = frozenset()
        self._share(self._needs)
        return True

    def keeps_out(self, state: RequestState) -> bool:
        """Whether one that waits has no part in this step."""
        return bool(self._first) and state.request.tenant not in self._first


def _giver(
    running: Sequence[RequestState], places: Mapping[str, int], light: AbstractSet[str], tenant: str, kept: Iterable[str]
) -> RequestState | None:
    """Who gives its place in a full batch to a request of ``tenant``; None = nobody.

    The latest of the tenant with most places, where the two differ by at least two, so that the exchange brings them nearer, or
    where the newcomer's tenant is light. Light tenants give none.

    Args:
        running: The batch, in order of admission.
        places: Of it, by tenant.
        light: Tenants that were lately served far less than their share.
        tenant: Whose request waits.
        kept: Ids of requests that stay.
    """
    most = max((each for each in places if each != tenant and each not in light), key=places.__getitem__, default=None)
    if most is None or (places[most] < places.get(tenant, 0) + 2 and tenant not in light):
        return None
    stay = set(kept)
    return next((s for s in reversed(running) if s.request.tenant == most and s.request_id not in stay), None)


def _order(state: RequestState) -> tuple[int, float]:
    return state.request.priority, state.request.arrival_s
