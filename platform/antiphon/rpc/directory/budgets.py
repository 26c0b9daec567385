"""Reservations and the ledger over gRPC: what the directory's client and service translate (control speed).

Must not know: the store.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, cast

from antiphon.core.budget import Kind, TenantLimits, Use, Verdict, Wish
from antiphon.rpc.v1 import directory_pb2 as pb

_Call = Callable[[str, Any, type[Any]], Awaitable[Any]]
_KINDS = ("requests", "tokens", "streams")


class RemoteBudgets:
    """``core.budget.Budgets`` over a directory's client. ``call``: method, request, kind of answer."""

    def __init__(self, call: _Call) -> None:
        self._call = call

    async def take_budget(self, wish: Wish) -> Verdict:
        """See ``Budgets``."""
        limits = wish.limits
        request = pb.TakeBudgetRequest(
            tenant=wish.tenant,
            ticket=wish.ticket,
            num_tokens=wish.num_tokens,
            lease_s=wish.lease_s,
            requests_per_min=limits.requests_per_min,
            tokens_per_min=limits.tokens_per_min,
            num_streams=limits.num_streams,
        )
        answer = await self._call("TakeBudget", request, pb.TakeBudgetResponse)
        exceeded = cast(Kind, answer.exceeded) if answer.exceeded in _KINDS else None
        return Verdict(exceeded=exceeded, retry_after_s=answer.retry_after_s)

    async def settle_budget(self, tenant: str, ticket: str, num_tokens: int) -> None:
        """See ``Budgets``."""
        request = pb.SettleBudgetRequest(tenant=tenant, ticket=ticket, num_tokens=num_tokens)
        await self._call("SettleBudget", request, pb.SettleBudgetResponse)

    async def renew_budgets(self, tenant: str, tickets: Sequence[str], lease_s: float) -> None:
        """See ``Budgets``."""
        request = pb.RenewBudgetsRequest(tenant=tenant, tickets=tickets, lease_s=lease_s)
        await self._call("RenewBudgets", request, pb.RenewBudgetsResponse)

    async def add_use(self, day: str, batch: str, uses: Sequence[Use]) -> None:
        """See ``Budgets``."""
        await self._call("AddUse", pb.AddUseRequest(day=day, batch=batch, uses=rows_of(uses)), pb.AddUseResponse)

    async def used(self, day: str) -> tuple[Use, ...]:
        """See ``Budgets``."""
        return uses_of((await self._call("ListUse", pb.ListUseRequest(day=day), pb.ListUseResponse)).uses)


def wish_of(request: pb.TakeBudgetRequest) -> Wish:
    """The value of a message."""
    limits = TenantLimits(
        requests_per_min=request.requests_per_min if request.HasField("requests_per_min") else None,
        tokens_per_min=request.tokens_per_min if request.HasField("tokens_per_min") else None,
        num_streams=request.num_streams if request.HasField("num_streams") else None,
    )
    return Wish(tenant=request.tenant, ticket=request.ticket, num_tokens=request.num_tokens, limits=limits, lease_s=request.lease_s)


def rows_of(uses: Iterable[Use]) -> list[pb.UseRow]:
    """Uses as messages."""
    return [
        pb.UseRow(
            tenant=use.tenant,
            model=use.model,
            num_requests=use.num_requests,
            num_prompt_tokens=use.num_prompt_tokens,
            num_cached_tokens=use.num_cached_tokens,
            num_output_tokens=use.num_output_tokens,
        )
        for use in uses
    ]


def uses_of(rows: Iterable[pb.UseRow]) -> tuple[Use, ...]:
    """Messages as uses."""
    return tuple(
        Use(
            tenant=row.tenant,
            model=row.model,
            num_requests=row.num_requests,
            num_prompt_tokens=row.num_prompt_tokens,
            num_cached_tokens=row.num_cached_tokens,
            num_output_tokens=row.num_output_tokens,
        )
        for row in rows
    )
