"""Judges an artifact as it stands on the rows of a table that it has not seen (control speed, offline).

Every prompt takes the way of a served one: ``router.judge`` and ``decision.decide``. Must not know: training.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from antiphon.coe.judging.judge import Estimate, calibration_error, estimate
from antiphon.coe.routing.artifact import Artifact
from antiphon.coe.routing.decision import EVERYONE_IDLE, Question, Reason, decide
from antiphon.coe.routing.router import judge, policy_terms, spec_of
from antiphon.coe.training.table import ScoreTable
from antiphon.coe.training.train import prompt_hash
from antiphon.core.document.composition import Policy
from antiphon.core.errors import InvalidInput


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Figures of an artifact on unseen rows, under one policy."""

    policy: Policy
    num_rows: int
    num_seen: int  # rows left out because the artifact was trained on them
    router: float
    general: float  # the artifact's general expert
    best_single: float  # the expert that is best on just these rows: no router knows it beforehand
    oracle: float
    over_general: Estimate
    avg_cost: float
    general_cost: float
    gate_rate: float
    category_accuracy: float | None  # of the rows whose category the artifact knows
    calibration_error: float | None


def unseen_rows(artifact: Artifact, table: ScoreTable) -> list[int]:
    """Rows that the artifact was not trained on."""
    seen = set(artifact.training["prompt_hashes"])
    return [i for i, prompt in enumerate(table.prompts) if prompt_hash(prompt) not in seen]


def judge_artifact(artifact: Artifact, table: ScoreTable, policy: Policy, seed: int) -> HeldOut | None:
    """Route every unseen row; None when there is none.

    Raises:
        InvalidInput: the table has not the artifact's experts.
    """
    columns = {expert.name: m for m, expert in enumerate(table.experts)}
    missing = [name for name in artifact.expert_names if name not in columns]
    if missing:
        raise InvalidInput(f"the table has no scores of expert {missing[0]!r}, which the artifact routes to", "table")
    rows = unseen_rows(artifact, table)
    if not rows:
        return None
    spec = spec_of(artifact)
    terms = policy_terms(artifact, spec, policy)
    known = {name: c for c, name in enumerate(artifact.categories)}
    chosen, gated, confidence, right = [], [], [], []
    for i in rows:
        judgement = judge(artifact, table.prompts[i], strictness=1.0, slow_path=True)
        decision = decide(Question(prompt="", policy=policy), judgement, spec, terms, EVERYONE_IDLE)
        chosen.append(columns[decision.expert])
        gated.append(decision.reason is Reason.UNCERTAIN)
        if table.categories[i] in known:
            confidence.append(judgement.confidence)
            right.append(judgement.category == table.categories[i])
    scores = table.scores[np.array(rows)]
    mine = scores[:, [columns[name] for name in artifact.expert_names]]
    score = scores[np.arange(len(rows)), chosen]
    general = mine[:, artifact.general]
    cost_of = {columns[name]: cost for name, cost in zip(artifact.expert_names, artifact.costs, strict=True)}
    return HeldOut(
        policy=policy,
        num_rows=len(rows),
        num_seen=len(table) - len(rows),
        router=float(score.mean()),
        general=float(general.mean()),
        best_single=float(mine.mean(axis=0).max()),
        oracle=float(mine.max(axis=1).mean()),
        over_general=estimate(score - general, seed),
        avg_cost=float(np.mean([cost_of[m] for m in chosen])),
        general_cost=artifact.costs[artifact.general],
        gate_rate=float(np.mean(gated)),
        category_accuracy=float(np.mean(right)) if right else None,
        calibration_error=calibration_error(np.array(confidence), np.array(right)) if right else None,
    )
