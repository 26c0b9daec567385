"""What a pool of experts is told and what it tells: who answers, its bounds, where each expert stands (values; request speed).

Must not know: queues, tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from antiphon.coe.tiers.policy import LoadTimes, Tier

_Ask = TypeVar("_Ask", contravariant=True)
_Answer = TypeVar("_Answer", covariant=True)


class ExpertServer(Protocol[_Ask, _Answer]):
    """Answers requests at resident experts; several groups at once, of one expert and of several."""

    async def serve(self, expert: str, asks: Sequence[_Ask], timeout_s: float) -> Sequence[_Answer]:
        """One answer per request, in their order. Raises DeadlineExceeded, Unavailable."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolOptions:
    """Deadlines and bounds of a pool."""

    load_timeout_s: float = 120.0
    serve_timeout_s: float = 120.0
    max_waiting: int = 1024
    prefetch: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class TierStanding:
    """One expert of a pool now."""

    tier: Tier
    num_waiting: int
    num_running: int
    load_s: float  # until it could answer, when it is not resident

    @property
    def is_resident(self) -> bool:
        """It can answer now."""
        return self.tier is Tier.RESIDENT


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStats:
    """Since start."""

    num_served: int
    num_groups: int
    num_switches: int
    num_prefetches: int
    num_failed_loads: int
    serve_s: float
    loads: tuple[tuple[str, LoadTimes], ...]  # the last ones
    num_loads: Mapping[str, int]  # by expert
