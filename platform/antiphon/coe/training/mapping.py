"""Which experts to keep and which one serves each category, as a mixed-integer linear program (control speed, offline).

    maximise   sum over c, m of share[c] · score[c, m] · x[c, m]
    subject to every category has one expert; x[c, m] <= keep[m]; memory of kept experts, their number and the average cost
               share[c] · cost[m] · x[c, m] stay within their budgets; the general expert is kept

Must not know: prompts, embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp

from antiphon.core.errors import InvalidInput

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Limits on a mapping; None = none."""

    max_avg_cost: float | None = None
    max_memory: float | None = None  # in the unit of ``memory_M``
    max_experts: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Mapping:
    """A solution: the expert of each category, the experts kept, and what it is worth."""

    expert_of: tuple[int, ...]
    kept: tuple[bool, ...]
    score: float
    avg_cost: float


def solve(
    score_CM: Doubles,
    share_C: Doubles,
    cost_M: Doubles,
    budget: Budget,
    *,
    general: int | None = None,
    memory_M: Doubles | None = None,
) -> Mapping:
    """The best mapping within ``budget``; ``general`` must be among the kept experts (None = no such expert).

    Raises:
        InvalidInput: no mapping keeps the budget.
    """
    C, M = score_CM.shape
    num_x = C * M
    memory = np.zeros(M) if memory_M is None else memory_M
    weight_CM = share_C[:, None] / share_C.sum()
    rows: list[Doubles] = []
    lower: list[float] = []
    upper: list[float] = []

    def constrain(row: Doubles, low: float, high: float) -> None:
        rows.append(row)
        lower.append(low)
        upper.append(high)

    for c in range(C):
        row = np.zeros(num_x + M)
        row[c * M : (c + 1) * M] = 1.0
        constrain(row, 1.0, 1.0)
        for m in range(M):
            row = np.zeros(num_x + M)
            row[c * M + m], row[num_x + m] = 1.0, -1.0
            constrain(row, -np.inf, 0.0)
    if budget.max_avg_cost is not None:
        constrain(np.concatenate([(weight_CM * cost_M).ravel(), np.zeros(M)]), -np.inf, budget.max_avg_cost)
    if budget.max_memory is not None:
        constrain(np.concatenate([np.zeros(num_x), memory]), -np.inf, budget.max_memory)
    if budget.max_experts is not None:
        constrain(np.concatenate([np.zeros(num_x), np.ones(M)]), -np.inf, float(budget.max_experts))
    fixed = np.zeros(num_x + M)
    if general is not None:
        fixed[num_x + general] = 1.0
    # A hair against keeping experts that serve nothing, far below any difference of scores.
    gain = np.concatenate([-(weight_CM * score_CM).ravel(), np.full(M, 1e-9)])
    found = milp(
        gain,
        constraints=LinearConstraint(np.stack(rows), lower, upper),
        integrality=np.ones(num_x + M),
        bounds=Bounds(fixed, np.ones(num_x + M)),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise InvalidInput("no choice of experts keeps this budget", "budget")
    x_CM = found.x[:num_x].reshape(C, M) > 0.5
    expert_of = x_CM.argmax(axis=1)
    category = np.arange(C)
    return Mapping(
        expert_of=tuple(int(m) for m in expert_of),
        kept=tuple(bool(kept > 0.5) for kept in found.x[num_x:]),
        score=float((weight_CM[:, 0] * score_CM[category, expert_of]).sum()),
        avg_cost=float((weight_CM[:, 0] * cost_M[expert_of]).sum()),
    )
