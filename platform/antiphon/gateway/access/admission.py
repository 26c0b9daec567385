"""Lets requests in within their tenant's limits, and keeps account of what they use (request speed).

    check_early() before a body is read; then
    enter() ─► reserved in the store ─► the answer ─► finish(): settled before the client has its last word, so that its next
       │                                         └──► leave():  settled soon, when it ended some other way
       └─► RateLimited

Tenants without limits cost nothing here but the ledger, which goes to the store every second. Where a store is away, tenants with
limits are refused: what can't be counted can't be kept to. Must not know: the doors, or which store.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Final

from antiphon.core.budget import Budgets, Kind, TenantLimits, Use, Verdict, Wish
from antiphon.core.errors import AntiphonError, InvalidInput, Overloaded
from antiphon.telemetry import Telemetry, semconv

_log = logging.getLogger(__name__)

LEASE_S: Final = 30.0
RENEW_S: Final = 10.0
FLUSH_S: Final = 1.0
_STREAMS_RETRY_S: Final = 1.0  # as the store says
_MAX_UNSENT: Final = 10_000  # settlements while the store is away; reservations that are forgotten end with their lease

_WORDS: dict[Kind, str] = {"requests": "requests a minute", "tokens": "tokens a minute", "streams": "requests at once"}


class RateLimited(Overloaded):
    """The tenant's limits allow no more now."""

    code = "rate_limit_exceeded"


class Turn:
    """One request that was let in. ``finish`` or ``leave`` ends it; what comes second has no effect."""

    def __init__(self, admission: Admission, tenant: str, ticket: str | None) -> None:
        self._admission = admission
        self._tenant = tenant
        self._ticket = ticket
        self._open = True

    async def finish(self, use: Use) -> None:
        """It was answered, with this use."""
        if self._close(use) and self._ticket is not None:
            await self._admission.settle(self._tenant, self._ticket, _total(use))

    def leave(self, use: Use) -> None:
        """It ended some other way."""
        if self._close(use) and self._ticket is not None:
            self._admission.settle_soon(self._tenant, self._ticket, _total(use))

    def _close(self, use: Use) -> bool:
        was_open, self._open = self._open, False
        if was_open:
            self._admission.count(use)
        return was_open


class Admission:
    """Of one gateway; belongs to one event loop. ``run`` until cancelled, then ``flush``.

    Args:
        budgets: The store.
        limits: Those of a tenant now.
        telemetry: Takes the instruments.
        today: The day of the ledger, UTC.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        budgets: Budgets,
        limits: Callable[[str], TenantLimits],
        telemetry: Telemetry,
        today: Callable[[], datetime.date] = lambda: datetime.datetime.now(datetime.UTC).date(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._budgets = budgets
        self._limits = limits
        self._today = today
        self._clock = clock
        self._spent: dict[str, tuple[float, TenantLimits]] = {}  # until when a tenant's minute has no request left; limits then
        self._open: dict[str, set[str]] = {}  # tenant → tickets
        self._unsent: list[tuple[str, str, int]] = []
        self._uses: dict[tuple[str, str], Use] = {}
        self._batch: tuple[str, str, list[Use]] | None = None  # what is on its way, until the store has it
        self._wake = asyncio.Event()
        meter = telemetry.meter(__name__)
        self._tokens = meter.create_counter("antiphon.tenant.tokens", description="Tokens by tenant, model and kind.")
        self._refused = meter.create_counter("antiphon.tenant.refused", description="Requests over a tenant's limit.")

    def check_early(self, tenant: str) -> None:
        """Refuse, before anything is made of its body, what the store would refuse: a tenant without a request left in this minute,
        or with as many at once at this gateway alone as it may have. Those that stay within their limits do not pay for a flood's
        parsing and tokenising.

        Raises:
            RateLimited: so it is; for no longer than the store said.
        """
        held = self._open.get(tenant)
        if held is not None:
            limits = self._limits(tenant)
            if limits.num_streams is not None and len(held) >= limits.num_streams:
                raise self._limited(tenant, limits, "streams", _STREAMS_RETRY_S)
        spent = self._spent.get(tenant)
        if spent is None:
            return
        until_s, limits = spent
        left_s = until_s - self._clock()
        if left_s <= 0 or limits != self._limits(tenant):
            del self._spent[tenant]
            return
        raise self._limited(tenant, limits, "requests", left_s)

    async def enter(self, tenant: str, num_tokens: int, field: str | None) -> Turn:
        """Let a request of a tenant in that may use so many tokens; ``field`` says so in its body.

        Raises:
            RateLimited: a limit is reached.
            InvalidInput: it asks for more than the limit of a minute.
            Unavailable: the tenant has limits, and the store is away.
        """
        limits = self._limits(tenant)
        if limits.is_none:
            return Turn(self, tenant, None)
        if limits.tokens_per_min is not None and num_tokens > limits.tokens_per_min:
            raise InvalidInput(
                f"this may take {num_tokens} tokens, prompt and output together, and the API key has {limits.tokens_per_min} a "
                "minute: ask for fewer",
                field,
            )
        ticket = secrets.token_hex(12)
        wish = Wish(tenant=tenant, ticket=ticket, num_tokens=num_tokens, limits=limits, lease_s=LEASE_S)
        taking = asyncio.ensure_future(self._budgets.take_budget(wish))
        try:
            verdict = await asyncio.shield(taking)
        except asyncio.CancelledError:  # the client left; what the store says then, or does not, is given back
            taking.add_done_callback(lambda done: self._give_back(tenant, ticket, done))
            raise
        if verdict.exceeded is not None:
            if verdict.exceeded == "requests":
                self._spent[tenant] = self._clock() + verdict.retry_after_s, limits
            raise self._limited(tenant, limits, verdict.exceeded, verdict.retry_after_s)
        self._open.setdefault(tenant, set()).add(ticket)
        return Turn(self, tenant, ticket)

    @asynccontextmanager
    async def unasked(self, tenant: str) -> AsyncIterator[None]:
        """A request that no model answers (tokenizing, counting, a router's word): one of its tenant's a minute and at once, and no
        tokens. Raises as ``enter``.
        """
        turn = await self.enter(tenant, 0, None)
        nothing = Use(tenant=tenant, model="", num_requests=0, num_prompt_tokens=0, num_cached_tokens=0, num_output_tokens=0)
        try:
            yield
            await turn.finish(nothing)
        finally:
            turn.leave(nothing)

    def _limited(self, tenant: str, limits: TenantLimits, kind: Kind, retry_after_s: float) -> RateLimited:
        self._refused.add(1, {"tenant": tenant, "limit": kind})
        most = {"requests": limits.requests_per_min, "tokens": limits.tokens_per_min, "streams": limits.num_streams}[kind]
        return RateLimited(f"the API key's limit of {most} {_WORDS[kind]} is reached", retry_after_s)

    def count(self, use: Use) -> None:
        """Put into the ledger and the metrics."""
        if not use.num_requests:
            return
        key = (use.tenant, use.model)
        before = self._uses.get(key)
        self._uses[key] = use if before is None else _added(before, use)
        attributes = {"tenant": use.tenant, semconv.REQUEST_MODEL: use.model}
        for kind, number in (
            ("prompt", use.num_prompt_tokens),
            ("cached", use.num_cached_tokens),
            ("output", use.num_output_tokens),
        ):
            if number:
                self._tokens.add(number, {**attributes, "kind": kind})

    async def settle(self, tenant: str, ticket: str, num_tokens: int) -> None:
        """End a reservation now; if the store is away, soon."""
        try:
            await self._budgets.settle_budget(tenant, ticket, num_tokens)
            self._forget(tenant, ticket)
        except AntiphonError as error:
            _log.warning("a reservation is settled later: %s", error)
            self.settle_soon(tenant, ticket, num_tokens)
        except asyncio.CancelledError:  # the client left at the last word: settling twice settles once
            self.settle_soon(tenant, ticket, num_tokens)
            raise

    def settle_soon(self, tenant: str, ticket: str, num_tokens: int) -> None:
        """End a reservation in ``run``."""
        if len(self._unsent) >= _MAX_UNSENT:
            self._forget(*self._unsent.pop(0)[:2])
        self._unsent.append((tenant, ticket, num_tokens))
        self._wake.set()

    async def run(self) -> None:
        """Settle, renew, write the ledger; until cancelled."""
        loop = asyncio.get_running_loop()
        renewed_s = loop.time()
        while True:
            try:
                async with asyncio.timeout(FLUSH_S):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            try:
                if loop.time() - renewed_s >= RENEW_S:
                    renewed_s = loop.time()
                    for tenant, tickets in tuple(self._open.items()):
                        await self._budgets.renew_budgets(tenant, sorted(tickets), LEASE_S)
                await self.flush()
            except AntiphonError as error:
                _log.warning("the accounts of tenants can't be written now: %s", error)
                await asyncio.sleep(FLUSH_S)

    async def flush(self) -> None:
        """Write what is left.

        Raises:
            Unavailable: the store is away; nothing is lost.
        """
        while self._unsent:
            tenant, ticket, num_tokens = self._unsent[0]
            await self._budgets.settle_budget(tenant, ticket, num_tokens)
            if self._unsent and self._unsent[0][1] == ticket:
                del self._unsent[0]
            self._forget(tenant, ticket)
        if self._batch is None and self._uses:
            self._batch = (self._today().isoformat(), secrets.token_hex(12), list(self._uses.values()))
            self._uses = {}
        if self._batch is not None:
            await self._budgets.add_use(*self._batch)
            self._batch = None

    async def used(self, first: datetime.date, last: datetime.date) -> list[tuple[str, Use]]:
        """The ledger of days, both included, with what this gateway has not written yet.

        Raises:
            Unavailable: the store is away.
        """
        await self.flush()
        found = []
        for number in range((last - first).days + 1):
            day = (first + datetime.timedelta(days=number)).isoformat()
            found += [(day, use) for use in await self._budgets.used(day)]
        return found

    def _give_back(self, tenant: str, ticket: str, taking: asyncio.Future[Verdict]) -> None:
        """Nobody uses what was taken."""
        if not taking.cancelled() and (taking.exception() is not None or taking.result().exceeded is None):
            self.settle_soon(tenant, ticket, 0)

    def _forget(self, tenant: str, ticket: str) -> None:
        tickets = self._open.get(tenant, set())
        tickets.discard(ticket)
        if not tickets:
            self._open.pop(tenant, None)


def _total(use: Use) -> int:
    return use.num_prompt_tokens + use.num_output_tokens


def _added(one: Use, other: Use) -> Use:
    return replace(
        one,
        num_requests=one.num_requests + other.num_requests,
        num_prompt_tokens=one.num_prompt_tokens + other.num_prompt_tokens,
        num_cached_tokens=one.num_cached_tokens + other.num_cached_tokens,
        num_output_tokens=one.num_output_tokens + other.num_output_tokens,
    )
