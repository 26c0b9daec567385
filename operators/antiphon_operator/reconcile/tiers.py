"""Where a composition's experts are, scraped from its model pool's /metrics (control speed).

Must not know: what follows from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import httpx2
from prometheus_client.parser import text_string_to_metric_families

RESIDENT = "antiphon_tier_resident"
LOAD_EXPECTED = "antiphon_tier_load_expected_seconds"
_DEPLOYMENT_LABEL = "antiphon_deployment"
_DEADLINE_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TierSeen:
    """One expert on a model pool."""

    resident: bool
    wake_s: float  # until it could answer, as the pool expects; 0 while it is resident


class TierSource(Protocol):
    """Knows where experts are."""

    async def read(self, url: str) -> Mapping[str, TierSeen]:
        """By LLMDeployment; empty when the pool does not answer. ``url``: of its /metrics."""
        ...


class NoTiers:
    """Knows nothing: a TierSource for tests and for an operator that must not connect."""

    async def read(self, url: str) -> Mapping[str, TierSeen]:
        """Nothing."""
        return {}


class ScrapedTiers:
    """Scrapes model pools. One event loop owns it."""

    def __init__(self) -> None:
        self._client = httpx2.AsyncClient(timeout=_DEADLINE_S, verify=False)  # see scrape.ScrapedMetrics

    async def __aenter__(self) -> ScrapedTiers:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def read(self, url: str) -> Mapping[str, TierSeen]:
        """See TierSource."""
        try:
            answer = await self._client.get(url)
            answer.raise_for_status()
        except httpx2.HTTPError:
            return {}
        return tiers_in(answer.text)


def tiers_in(text: str) -> Mapping[str, TierSeen]:
    """What ``text``, of a gateway's /metrics, says of experts that share memory."""
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in (RESIDENT, LOAD_EXPECTED) and _DEPLOYMENT_LABEL in sample.labels:
                found.setdefault(sample.labels[_DEPLOYMENT_LABEL], {})[sample.name] = sample.value
    return {
        name: TierSeen(resident=values[RESIDENT] > 0, wake_s=_rounded(values.get(LOAD_EXPECTED, 0.0)))
        for name, values in found.items()
        if RESIDENT in values
    }


def _rounded(seconds: float) -> float:
    """Two digits: a status that changes with every measurement would be written with every look."""
    return float(f"{seconds:.2g}")
