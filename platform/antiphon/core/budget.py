"""What tenants may use and have used: limits, reservations, a ledger; the seam to the store that keeps them (control speed).

    a gateway:  take() ─► granted: a reservation ──► the answer ──► settle() with the tokens that it took
                     └─► refused, with the reason and when to come back

Tokens of a reservation count as used until it is settled, and what it took counts for a minute from then. So in no minute more is
used than the limit, however many gateways ask the same store. A reservation that nobody renews counts as used whole, from the end
of its lease. Must not know: which store it is, or who is refused.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol

from antiphon.core.errors import InvalidInput

WINDOW_S: Final = 60
MAX_RESERVATIONS: Final = 65_536  # of one tenant
MAX_RENEWED: Final = 65_536  # in one call
MAX_TOKENS: Final = 1 << 40
MAX_USES: Final = 65_536  # in one batch of the ledger
KEPT_DAYS: Final = 400  # of the ledger

Kind = Literal["requests", "tokens", "streams"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantLimits:
    """None = no limit."""

    requests_per_min: int | None = None
    tokens_per_min: int | None = None  # prompt and output together, cached ones included
    num_streams: int | None = None  # requests being answered at once

    @property
    def is_none(self) -> bool:
        """Whether there is nothing to keep to."""
        return self == NO_LIMITS


NO_LIMITS: Final = TenantLimits()


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """One request's reservation."""

    tenant: str
    ticket: str  # names the reservation; taking it twice takes it once
    num_tokens: int  # the most that it may use
    limits: TenantLimits
    lease_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What came of a wish. ``exceeded``: None = granted."""

    exceeded: Kind | None = None
    retry_after_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """What a tenant used of a model."""

    tenant: str
    model: str
    num_requests: int
    num_prompt_tokens: int
    num_cached_tokens: int  # of the prompt's
    num_output_tokens: int


class Budgets(Protocol):
    """Where reservations and the ledger are. Every method raises Unavailable while the store can't be reached."""

    async def take_budget(self, wish: Wish) -> Verdict:
        """Reserve, if all limits allow it."""
        ...

    async def settle_budget(self, tenant: str, ticket: str, num_tokens: int) -> None:
        """End a reservation: so much was used. Without effect where there is none."""
        ...

    async def renew_budgets(self, tenant: str, tickets: Sequence[str], lease_s: float) -> None:
        """Keep reservations for ``lease_s`` seconds more; those that are gone stay so."""
        ...

    async def add_use(self, day: str, batch: str, uses: Sequence[Use]) -> None:
        """Add to the ledger; a batch that came already is left out. Raises InvalidInput for what can't be right."""
        ...

    async def used(self, day: str) -> Sequence[Use]:
        """The ledger of a day, ordered by tenant and model."""
        ...


def judge(wish: Wish, window: Iterable[tuple[int, int, int]], num_open: int, num_reserved: int, now_s: float) -> Verdict:
    """Whether a wish fits, the decision of every store.

    Args:
        wish: What is asked for.
        window: (second, requests, tokens) of the last minute.
        num_open: Reservations that are open.
        num_reserved: Their tokens.
        now_s: The store's clock.
    """
    seconds = sorted(window)
    limits = wish.limits
    if limits.num_streams is not None and num_open >= limits.num_streams:
        return Verdict(exceeded="streams", retry_after_s=1.0)
    if num_open >= MAX_RESERVATIONS:
        return Verdict(exceeded="streams", retry_after_s=1.0)
    if limits.requests_per_min is not None:
        over = sum(requests for _, requests, _ in seconds) + 1 - limits.requests_per_min
        if over > 0:
            return Verdict(exceeded="requests", retry_after_s=_until_free([(s, n) for s, n, _ in seconds], over, now_s))
    if limits.tokens_per_min is not None:
        over = sum(tokens for _, _, tokens in seconds) + num_reserved + wish.num_tokens - limits.tokens_per_min
        if over > 0:
            return Verdict(exceeded="tokens", retry_after_s=_until_free([(s, n) for s, _, n in seconds], over, now_s))
    return Verdict()


def is_current(second: int, now_s: float) -> bool:
    """Whether what was used in a second still counts: whole seconds, so for a minute at least."""
    return second >= int(now_s) - WINDOW_S


def check_wish(wish: Wish) -> None:
    """Raise InvalidInput where a number can't be right."""
    if not 0 <= wish.num_tokens <= MAX_TOKENS:
        raise InvalidInput(f"{wish.num_tokens} tokens", "num_tokens")


def check_tokens(num_tokens: int) -> None:
    """The same for what was used."""
    if not 0 <= num_tokens <= MAX_TOKENS:
        raise InvalidInput(f"{num_tokens} tokens", "num_tokens")


def check_uses(day: str, uses: Sequence[Use]) -> None:
    """The same for a batch of the ledger: one that is wrong would spoil the day of all tenants."""
    try:
        right = datetime.date.fromisoformat(day).isoformat() == day
    except ValueError:
        right = False
    if not right:
        raise InvalidInput(f"{day[:64]!r} is no day, like 2027-01-31", "day")
    if len(uses) > MAX_USES:
        raise InvalidInput(f"{len(uses)} rows in one batch", "uses")
    for use in uses:
        for number in (use.num_requests, use.num_prompt_tokens, use.num_cached_tokens, use.num_output_tokens):
            if not 0 <= number <= MAX_TOKENS:
                raise InvalidInput(f"{number} in a row of the ledger", "uses")


def _until_free(used: Sequence[tuple[int, int]], over: int, now_s: float) -> float:
    """Seconds until so much of the window has passed that ``over`` is free; 1 where open reservations hold it."""
    for second, number in used:
        over -= number
        if over <= 0:
            return max(1.0, second + WINDOW_S + 1 - now_s)
    return 1.0
