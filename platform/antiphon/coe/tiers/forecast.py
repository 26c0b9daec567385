"""How many requests a second each expert is expected to get: what was routed lately, exponentially forgotten (request speed).

A decision counts for its expert and, in smaller part, for those that came close: a similar prompt may well go there. Must not
know: memory, clocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from antiphon.coe.routing.decision import Decision, Reason

DEFAULT_HALF_LIFE_S = 30.0
_CLOSE = 0.02  # difference of totals at which an expert's share falls to 1/e


class Forecast:
    """Requests per second by expert. Belongs to one thread or event loop."""

    def __init__(self, half_life_s: float = DEFAULT_HALF_LIFE_S) -> None:
        """``half_life_s``: after so long a request counts half."""
        self._half_life_s = half_life_s
        self._rates: dict[str, float] = {}
        self._seen_s = -math.inf

    def observe(self, shares: Mapping[str, float], now_s: float) -> None:
        """One request was routed; ``shares`` sum to 1. ``now_s`` never falls."""
        self._forget(now_s)
        for name, share in shares.items():
            self._rates[name] = self._rates.get(name, 0.0) + share * math.log(2) / self._half_life_s

    def expected(self, now_s: float) -> dict[str, float]:
        """Requests per second, by expert; one that was never seen is absent."""
        self._forget(now_s)
        return dict(self._rates)

    def _forget(self, now_s: float) -> None:
        if now_s > self._seen_s:
            kept = 0.5 ** ((now_s - self._seen_s) / self._half_life_s)
            self._rates = {name: rate * kept for name, rate in self._rates.items()}
            self._seen_s = now_s


def shares_of(decision: Decision) -> dict[str, float]:
    """What one decision says about the next: all for its expert unless it was a question of score, then close ones share."""
    if decision.reason is not Reason.SCORE:
        return {decision.expert: 1.0}
    totals = {c.expert: c.total for c in decision.candidates if c.total is not None}
    best = totals[decision.expert]
    weights = {name: math.exp(min(0.0, (total - best) / _CLOSE)) for name, total in totals.items()}
    whole = sum(weights.values())
    return {name: weight / whole for name, weight in weights.items() if weight > 1e-3}
