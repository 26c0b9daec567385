"""What waiting for the slowest costs: of r attention workers, and of the FFN card with the hottest experts (pure arithmetic).

Must not know: models or hardware.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from antiphon.planner.cost.formula import formula


@cache
def expected_max(count: int) -> float:
    """Expectation of the greatest of ``count`` standard normal numbers.

    The integral of x d(Phi(x)^count), by the midpoint rule in the quantile: exact to four digits up to a million.
    """
    if count <= 1:
        return 0.0
    x = np.linspace(-8.0, 10.0, 8001)
    density = np.exp(-0.5 * x * x) / np.sqrt(2 * np.pi)
    below = np.cumsum(density) * (x[1] - x[0])
    below = np.clip(below / below[-1], 1e-300, 1.0)
    return float(np.trapezoid(x * count * density * below ** (count - 1), x))


@formula("token/row", mean="token/row", deviation="token/row", rows="", slowest="")
def slowest_context(*, mean: float, deviation: float, rows: float, slowest: float) -> float:
    """Mean context of the attention worker whose rows have the longest contexts (a normal approximation)."""
    return mean + deviation * slowest / rows**0.5  # type: ignore[no-any-return]  # a float's power


@formula("", slowest="", num_cards="", draws="", skew="")
def hottest_share(*, slowest: float, num_cards: float, draws: float, skew: float) -> float:
    """Load of the hottest FFN card over the mean: lasting skew, and chance in which experts the rows draw."""
    return skew + slowest * ((num_cards - 1) / draws) ** 0.5  # type: ignore[no-any-return]  # a float's power


def imbalance(*, rows: float, experts_per_row: int, num_cards: int, skew: float) -> float:
    """``hottest_share`` for a batch; at most every row lands on one card."""
    if num_cards <= 1 or experts_per_row == 0:
        return 1.0
    draws = max(1.0, rows * experts_per_row)
    load = hottest_share(slowest=expected_max(num_cards), num_cards=num_cards, draws=draws, skew=skew)
    return min(load, float(num_cards))
