"""Judges an artifact as it stands on the rows of a table that it has not seen (control speed, offline).

Every prompt takes the way of a served one: ``router.judge`` and ``decision.decide``. Must not know: training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from antiphon.coe.judging.comparisons import COMPARISONS, Rows, expected_scores
from antiphon.coe.judging.judge import Estimate, TwoModels, calibration_error, estimate, two_models
from antiphon.coe.routing.artifact import Artifact
from antiphon.coe.routing.decision import EVERYONE_IDLE, Question, Reason, decide
from antiphon.coe.routing.router import judge, policy_terms, spec_of
from antiphon.coe.training.data.table import ScoreTable, filled
from antiphon.coe.training.train import prompt_hash
from antiphon.core.document.composition import Policy
from antiphon.core.errors import InvalidInput

Doubles = npt.NDArray[np.float64]


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
    expected: float  # what the artifact expected of its picks
    gate_rate: float
    by_dataset: dict[str, tuple[int, float, float]]  # rows, router, general
    two_models: TwoModels | None  # with two experts
    over: dict[str, Estimate]  # against each comparison that learnt from the training table, row by row
    category_accuracy: float | None  # of the rows whose category the artifact knows
    calibration_error: float | None


def unseen_rows(artifact: Artifact, table: ScoreTable) -> list[int]:
    """Rows that the artifact was not trained on."""
    seen = set(artifact.training["prompt_hashes"])
    return [i for i, prompt in enumerate(table.prompts) if prompt_hash(prompt) not in seen]


def judge_artifact(
    artifact: Artifact,
    table: ScoreTable,
    policy: Policy,
    seed: int,
    learnt: ScoreTable | None = None,
    at_least: float | None = None,
) -> HeldOut | None:
    """Route every unseen row whose scores are all known; None when there is none.

    ``at_least`` is a share of the best quality to keep at the least cost, instead of ``policy``. ``learnt`` is the table that the
    artifact was trained on: the comparisons learn from it and are asked the same.

    Raises:
        InvalidInput: a table has not the artifact's experts.
    """
    columns = {expert.name: m for m, expert in enumerate(table.experts)}
    missing = [name for name in artifact.expert_names if name not in columns]
    if missing:
        raise InvalidInput(f"the table has no scores of expert {missing[0]!r}, which the artifact routes to", "table")
    known_rows = set(table.complete.tolist())
    rows = [i for i in unseen_rows(artifact, table) if i in known_rows]
    if not rows:
        return None
    spec = spec_of(artifact)
    terms = policy_terms(artifact, spec, policy, at_least=at_least)
    known = {name: c for c, name in enumerate(artifact.categories)}
    chosen, gated, confidence, right = [], [], [], []
    expected, advantage = [], []
    means = {expert.name: expert.mean_score for expert in artifact.experts}
    weak, strong = min(means, key=lambda name: means[name]), max(means, key=lambda name: means[name])
    for i in rows:
        judgement = judge(artifact, table.prompts[i], strictness=1.0, slow_path=True)
        decision = decide(Question(prompt="", policy=policy), judgement, spec, terms, EVERYONE_IDLE)
        chosen.append(columns[decision.expert])
        expected.append(judgement.scores[decision.expert])
        advantage.append(judgement.scores[strong] - judgement.scores[weak])
        gated.append(decision.reason is Reason.UNCERTAIN)
        if table.categories[i] in known:
            confidence.append(judgement.confidence)
            right.append(judgement.category == table.categories[i])
    scores = table.scores[np.array(rows)]
    mine = scores[:, [columns[name] for name in artifact.expert_names]]
    score = scores[np.arange(len(rows)), chosen]
    general = mine[:, artifact.general]
    datasets = np.array([table.datasets[i] for i in rows])
    cost_of = {columns[name]: cost for name, cost in zip(artifact.expert_names, artifact.costs, strict=True)}
    return HeldOut(
        policy=policy,
        num_rows=len(rows),
        num_seen=len(table) - len(unseen_rows(artifact, table)),
        router=float(score.mean()),
        general=float(general.mean()),
        best_single=float(mine.mean(axis=0).max()),
        oracle=float(mine.max(axis=1).mean()),
        over_general=estimate(score - general, seed),
        avg_cost=float(np.mean([cost_of[m] for m in chosen])),
        general_cost=artifact.costs[artifact.general],
        expected=float(np.mean(expected)),
        gate_rate=float(np.mean(gated)),
        by_dataset={
            str(name): (
                int((datasets == name).sum()),
                float(score[datasets == name].mean()),
                float(general[datasets == name].mean()),
            )
            for name in np.unique(datasets)
        },
        two_models=two_models(np.array(advantage), scores, columns[weak], columns[strong]) if len(columns) == 2 else None,
        over={} if learnt is None else _over(artifact, learnt, table.rows(rows), score, seed),
        category_accuracy=float(np.mean(right)) if right else None,
        calibration_error=calibration_error(np.array(confidence), np.array(right)) if right else None,
    )


def _over(artifact: Artifact, learnt: ScoreTable, asked: ScoreTable, score_B: Doubles, seed: int) -> dict[str, Estimate]:
    names = [expert.name for expert in learnt.experts]
    if [expert.name for expert in asked.experts] != names:
        raise InvalidInput("both tables need the same experts in the same order to compare with simple routers", "learnt")
    learnt = filled(learnt)
    places = [f"{category}/{dataset}" for category, dataset in zip(learnt.categories, learnt.datasets, strict=True)]
    label_B = np.unique(places, return_inverse=True)[1].astype(np.int64)
    embedding = replace(artifact.embedding, topics=None, words=None)
    rows = Rows(
        prompts=[*learnt.prompts, *asked.prompts],
        embedding_BD=embedding.encode_all([*learnt.prompts, *asked.prompts]),
        num_near=embedding.num_near,
        label_B=np.concatenate([label_B, np.full(len(asked), -1)]),
        scores_BM=np.concatenate([learnt.scores, asked.scores]),
    )
    seen, new = np.arange(len(learnt)), len(learnt) + np.arange(len(asked))
    own = np.arange(len(asked))
    return {
        name: estimate(score_B - asked.scores[own, expected_scores(name, rows, seen, new).argmax(axis=1)], seed)
        for name in COMPARISONS
    }


def rows_of(found: HeldOut) -> list[tuple[str, ...]]:
    """A head, then the figures for people, each with its interval where it has one."""

    def points(e: Estimate) -> str:
        return f"{100 * e.mean:+.2f} points [{100 * e.low:+.2f}, {100 * e.high:+.2f}]"

    rows: list[tuple[str, ...]] = [
        ("rows, of which seen in training and left out", f"{found.num_rows + found.num_seen}, {found.num_seen}"),
        ("score, router", f"{found.router:.4f}"),
        ("score, general expert", f"{found.general:.4f}"),
        ("score, best single on just these rows", f"{found.best_single:.4f}"),
        ("score, oracle", f"{found.oracle:.4f}"),
        ("over the general expert", points(found.over_general)),
        *((f"over {name}", points(e)) for name, e in found.over.items()),
        ("average cost, router and general expert", f"{found.avg_cost:.1f}, {found.general_cost:.1f}"),
        ("expected of its picks", f"{found.expected:.4f}"),
        ("gate closed", f"{100 * found.gate_rate:.1f} %"),
    ]
    if found.two_models is not None:
        two = found.two_models
        rows.append(("APGR, CPT(50 %), CPT(80 %)", f"{two.apgr:.3f}, {two.cpt_50:.3f}, {two.cpt_80:.3f}"))
    if found.category_accuracy is not None and found.calibration_error is not None:
        rows.append(("category accuracy, calibration error", f"{found.category_accuracy:.4f}, {found.calibration_error:.4f}"))
    rows += [
        (f"dataset {name}, {num} rows: router, general", f"{router:.3f}, {general:.3f}")
        for name, (num, router, general) in found.by_dataset.items()
    ]
    return rows
