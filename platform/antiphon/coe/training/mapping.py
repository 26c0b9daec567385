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
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from antiphon.core.errors import InvalidInput

Doubles = npt.NDArray[np.float64]

_GAP = 1e-4  # of the score: far below what its noise tells apart
_TIME_LIMIT_S = 5.0  # the best found by then is taken


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
    if budget == Budget():
        return _unlimited(score_CM, share_C, cost_M, general)
    num_x = C * M
    memory = np.zeros(M) if memory_M is None else memory_M
    weight_CM = share_C[:, None] / share_C.sum()
    # x[c, m] <= keep[m] for each category and expert; one row per category says that it has one expert.
    of_x, of_keep = sparse.identity(num_x, format="csr"), sparse.vstack([sparse.identity(M)] * C, format="csr")
    served = sparse.kron(sparse.identity(C), np.ones((1, M)), format="csr")
    limits = [
        LinearConstraint(sparse.hstack([of_x, -of_keep], format="csr"), -np.inf, 0.0),
        LinearConstraint(sparse.hstack([served, sparse.csr_matrix((C, M))], format="csr"), 1.0, 1.0),
    ]
    none_M, none_X = np.zeros(M), np.zeros(num_x)
    for row, most in (
        (np.concatenate([(weight_CM * cost_M).ravel(), none_M]), budget.max_avg_cost),
        (np.concatenate([none_X, memory]), budget.max_memory),
        (np.concatenate([none_X, np.ones(M)]), None if budget.max_experts is None else float(budget.max_experts)),
    ):
        if most is not None:
            limits.append(LinearConstraint(row[None, :], -np.inf, most))
    fixed = np.zeros(num_x + M)
    if general is not None:
        fixed[num_x + general] = 1.0
    # A hair against keeping experts that serve nothing, far below any difference of scores.
    gain = np.concatenate([-(weight_CM * score_CM).ravel(), np.full(M, 1e-9)])
    found = milp(
        gain,
        constraints=limits,
        # With every expert's keeping decided, categories choose by themselves: only a limit on cost makes them share.
        integrality=np.concatenate([np.full(num_x, 0 if budget.max_avg_cost is None else 1), np.ones(M)]),
        bounds=Bounds(fixed, np.ones(num_x + M)),
        options={"mip_rel_gap": _GAP, "time_limit": _TIME_LIMIT_S},
    )
    if found.x is None:
        raise InvalidInput("no choice of experts keeps this budget", "budget")
    return _mapping(score_CM, share_C, cost_M, found.x[:num_x].reshape(C, M).argmax(axis=1), general)


def _unlimited(score_CM: Doubles, share_C: Doubles, cost_M: Doubles, general: int | None) -> Mapping:
    """Each category's best expert, the cheaper of equals: without a limit there is nothing to weigh."""
    expert_of = (score_CM - 1e-9 * cost_M / max(float(cost_M.max()), 1e-12)).argmax(axis=1)
    return _mapping(score_CM, share_C, cost_M, expert_of, general)


def _mapping(
    score_CM: Doubles, share_C: Doubles, cost_M: Doubles, expert_of: npt.NDArray[np.int64], general: int | None
) -> Mapping:
    weight_C = share_C / share_C.sum()
    used = {int(m) for m in expert_of} | ({general} if general is not None else set())
    return Mapping(
        expert_of=tuple(int(m) for m in expert_of),
        kept=tuple(m in used for m in range(len(cost_M))),
        score=float((weight_C * score_CM[np.arange(len(expert_of)), expert_of]).sum()),
        avg_cost=float((weight_C * cost_M[expert_of]).sum()),
    )
