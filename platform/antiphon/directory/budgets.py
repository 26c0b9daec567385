"""Reservations and the ledger in this process' memory (control speed). ``core.budget`` has the contract.

Must not know: who asks.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from antiphon.core.budget import KEPT_DAYS, MAX_RENEWED, Use, Verdict, Wish, check_tokens, check_uses, check_wish, is_current, judge
from antiphon.core.directory import check_lease, check_names
from antiphon.core.errors import InvalidInput, Unavailable

_MAX_TENANTS: Final = 16_384
_MAX_ROWS: Final = 65_536  # of one day
_MAX_LEDGER: Final = 1 << 20  # rows of all days
_MAX_OPEN: Final = 1 << 19  # reservations of all tenants
_MAX_BATCHES: Final = 4096
_MAX_SUM: Final = 2**63 - 1  # as in Redis; more fits no message


@dataclass(slots=True)
class _Account:
    window: dict[int, list[int]] = field(default_factory=dict)  # second → requests, tokens
    open: dict[str, tuple[int, float]] = field(default_factory=dict)  # ticket → tokens, end of the lease

    def tidy(self, now_s: float) -> None:
        """Charge what nobody renewed; forget what is older than a minute."""
        for ticket, (tokens, until_s) in tuple(self.open.items()):
            if until_s <= now_s:
                del self.open[ticket]
                self.add(until_s, tokens=tokens)
        for second in [second for second in self.window if not is_current(second, now_s)]:
            del self.window[second]

    def add(self, at_s: float, *, requests: int = 0, tokens: int = 0) -> None:
        """Count."""
        entry = self.window.setdefault(int(at_s), [0, 0])
        entry[0] += requests
        entry[1] += tokens


class MemoryBudgets:
    """Belongs to one event loop. ``clock``: monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._accounts: dict[str, _Account] = {}
        self._takes_left = _MAX_OPEN  # at least, until they are counted again
        self._days: dict[str, dict[tuple[str, str], Use]] = {}
        self._batches: OrderedDict[str, None] = OrderedDict()

    async def take_budget(self, wish: Wish) -> Verdict:
        """See ``Budgets``."""
        check_lease(wish.lease_s)
        check_names(tenant=wish.tenant, ticket=wish.ticket)
        check_wish(wish)
        now_s = self._clock()
        account = self._account(wish.tenant, now_s)
        if wish.ticket not in account.open:
            entries = [(second, *counts) for second, counts in account.window.items()]
            window = [(second, requests, tokens) for second, requests, tokens in entries]
            verdict = judge(wish, window, len(account.open), sum(tokens for tokens, _ in account.open.values()), now_s)
            if verdict.exceeded is not None:
                return verdict
            if not self._takes_left:
                self._takes_left = max(0, _MAX_OPEN - sum(len(each.open) for each in self._accounts.values()))
            if not self._takes_left:
                raise Unavailable(f"the directory is full: {_MAX_OPEN} requests have reservations")
            self._takes_left -= 1
            account.add(now_s, requests=1)
        account.open[wish.ticket] = (wish.num_tokens, now_s + wish.lease_s)
        return Verdict()

    async def settle_budget(self, tenant: str, ticket: str, num_tokens: int) -> None:
        """See ``Budgets``."""
        check_tokens(num_tokens)
        now_s = self._clock()
        account = self._accounts.get(tenant)
        if account is None:
            return
        account.tidy(now_s)
        if account.open.pop(ticket, None) is not None:
            account.add(now_s, tokens=num_tokens)

    async def renew_budgets(self, tenant: str, tickets: Sequence[str], lease_s: float) -> None:
        """See ``Budgets``."""
        check_lease(lease_s)
        if len(tickets) > MAX_RENEWED:
            raise InvalidInput(f"{len(tickets)} reservations in one call", "tickets")
        now_s = self._clock()
        account = self._accounts.get(tenant)
        if account is None:
            return
        account.tidy(now_s)
        for ticket in tickets:
            if ticket in account.open:
                account.open[ticket] = (account.open[ticket][0], now_s + lease_s)

    async def add_use(self, day: str, batch: str, uses: Sequence[Use]) -> None:
        """See ``Budgets``."""
        check_names(batch=batch)
        check_uses(day, uses)
        for use in uses:
            check_names(tenant=use.tenant, model=use.model)
        if batch in self._batches:
            return
        rows = self._days.get(day, {})
        if len(rows) + len({(use.tenant, use.model) for use in uses} - rows.keys()) > _MAX_ROWS:  # all of the batch, or nothing
            raise Unavailable(f"the ledger of {day} is full")
        self._days[day] = rows
        for use in uses:
            key = (use.tenant, use.model)
            before = rows.get(key)
            rows[key] = use if before is None else added(before, use)
        self._batches[batch] = None
        if len(self._batches) > _MAX_BATCHES:
            self._batches.popitem(last=False)
        for old in sorted(self._days)[:-KEPT_DAYS]:
            del self._days[old]
        while len(self._days) > 1 and sum(map(len, self._days.values())) > _MAX_LEDGER:
            del self._days[min(self._days)]

    async def used(self, day: str) -> tuple[Use, ...]:
        """See ``Budgets``."""
        return tuple(use for _, use in sorted(self._days.get(day, {}).items()))

    def _account(self, tenant: str, now_s: float) -> _Account:
        account = self._accounts.get(tenant)
        if account is None:
            if len(self._accounts) >= _MAX_TENANTS:
                for name, each in tuple(self._accounts.items()):
                    each.tidy(now_s)
                    if not each.open and not each.window:
                        del self._accounts[name]
            if len(self._accounts) >= _MAX_TENANTS:
                raise Unavailable(f"the directory is full: {_MAX_TENANTS} tenants have budgets")
            account = self._accounts[tenant] = _Account()
        account.tidy(now_s)
        return account


def added(one: Use, other: Use) -> Use:
    """Both together, of one tenant and model."""
    return replace(
        one,
        num_requests=min(_MAX_SUM, one.num_requests + other.num_requests),
        num_prompt_tokens=min(_MAX_SUM, one.num_prompt_tokens + other.num_prompt_tokens),
        num_cached_tokens=min(_MAX_SUM, one.num_cached_tokens + other.num_cached_tokens),
        num_output_tokens=min(_MAX_SUM, one.num_output_tokens + other.num_output_tokens),
    )
