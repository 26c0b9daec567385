"""What judging found as tables for people: headline figures, policies, datasets (control speed, offline).

Must not know: how figures are computed.
"""

from __future__ import annotations

from antiphon.coe.judging import judge
from antiphon.coe.judging.comparisons import COMPARISONS, ORACLE, SIMPLE
from antiphon.coe.judging.judge import Estimate
from antiphon.coe.judging.report import Report


def rows_for_people(report: Report) -> list[tuple[str, str]]:
    """Name and value of every headline figure."""
    unit = "B" if "parameters" in report.cost_unit else ""
    at_quality = report.cost_at_single_quality
    rows = [(f"score, {name}", f"{score:.4f}") for name, score in report.scores.items()]
    rows += [
        ("over best single, 5-fold", _points(report.over_best_single)),
        ("cost at best single's quality", "not reached" if at_quality is None else f"{at_quality:.1f}{unit}"),
        ("cost of best single", f"{report.single_cost:.1f}{unit}"),
        ("AIQ", f"{report.aiq:.4f}"),
    ]
    if report.left_out is not None and report.gate_rate_left_out is not None:
        rows.append((f"against best single, {_unseen(report)}", _points(report.left_out)))
        rows.append((f"gated, {_unseen(report)}", f"{100 * report.gate_rate_left_out:.1f} %"))
    rows += [
        ("gated, 5-fold", f"{100 * report.gate_rate:.1f} %"),
        ("asked the slow path, 5-fold", f"{100 * report.slow_rate:.1f} %"),
        ("category accuracy", f"{report.category_accuracy:.4f}"),
        (f"calibration error, {judge.NUM_BINS} bins", f"{report.calibration_error:.4f}"),
    ]
    rows += [(f"same expert: {name}", f"{e.mean:.3f} [{e.low:.3f}, {e.high:.3f}]") for name, e in report.agreement.items()]
    rows += [
        (f"APGR, CPT(50 %), CPT(80 %), {how}: {name}", f"{two.apgr:.3f}, {two.cpt_50:.3f}, {two.cpt_80:.3f}")
        for how, found in (("five folds", report.two_models), (_unseen(report), report.two_models_left_out))
        for name, two in found.items()
    ]
    rows.append(("expected of its picks, five folds", f"{report.expected:.4f}, scored {report.scores['router']:.4f}"))
    if report.expected_left_out is not None and report.score_left_out is not None:
        told = f"{report.expected_left_out:.4f}, scored {report.score_left_out:.4f}"
        rows.append((f"expected of its picks, {_unseen(report)}", told))
    return rows


Rows = list[tuple[str, ...]]


def policy_rows(report: Report) -> Rows:
    """A head, then a line per policy and way of judging: score, cost, and the differences to what it is compared with.

    Behind the policies, in brackets, the scores of what they are compared with.

    Comparisons route without cost but in the last two columns, where the simple router has the same policy.
    """
    others = [SIMPLE, *(name for name in report.scores if name in (*COMPARISONS, ORACLE) and name != SIMPLE)]
    alike = (f"− {SIMPLE}, same policy", "less its cost")
    rows: Rows = [("policy", "judged by", "score", "cost", "− best single", *(f"− {name}" for name in others), *alike)]
    judged = (
        ("five folds", report.policies, report.scores),
        (_unseen(report), report.policies_left_out, report.scores_left_out),
    )
    for how, policies, scores in judged:
        for name, found in policies.items():
            differences = (_points(found.over_single), *(_points(found.over[other]) for other in others))
            like = (_points(found.over_simple_alike), _points(found.utility_over_simple_alike))
            rows.append((name, how, f"{found.score:.4f}", f"{found.avg_cost:.1f}", *differences, *like))
        rows += [
            (f"({name})", how, f"{score:.4f}", *("–",) * (len(rows[0]) - 3)) for name, score in scores.items() if name != "router"
        ]
    return rows


def policy_tables(report: Report) -> list[tuple[str, Rows]]:
    """The same for a terminal of 80 columns, a title and rows per way of judging: a column per policy, a line per comparison."""
    ways = (("five folds", report.policies, report.scores), (_unseen(report), report.policies_left_out, report.scores_left_out))
    tables = []
    for how, policies, scores in ways:
        found = list(policies.values())
        if not found:
            continue
        rows: Rows = [
            ("", *policies),
            ("score", *(f"{one.score:.4f}" for one in found)),
            ("cost", *(f"{one.avg_cost:.1f}" for one in found)),
            (_scored("single", scores["best single"]), *(_short(one.over_single) for one in found)),
            *(
                (_scored(name, scores[name]), *(_short(one.over[name]) for one in found))
                for name in (*COMPARISONS, ORACLE)
                if name in scores
            ),
            ("simple alike", *(_short(one.over_simple_alike) for one in found)),
            ("less its cost", *(_short(one.utility_over_simple_alike) for one in found)),
        ]
        tables.append((f"policies, {how}: points above each, 95 % intervals", rows))
    return tables


def _short(e: Estimate) -> str:
    """At most 20 characters."""
    places = 2 if max(abs(e.low), abs(e.high)) < 0.09995 else 1
    mean, low, high = (f"{100 * value:+.{places}f}" for value in (e.mean, e.low, e.high))
    return f"{mean} [{low}, {high}]"


def _scored(name: str, score: float) -> str:
    return f"{name} {score:.4f}"


def _unseen(report: Report) -> str:
    return f"{report.left_out_kind or 'dataset'} unseen"


def dataset_rows(report: Report) -> Rows:
    """A head, then a line per dataset: router, best single expert and simple router, its prompts known in part and not at all."""

    def shown(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"

    head = ("dataset", "prompts", "router", "single", "simple", "unseen: router", "single", "simple")
    rows: Rows = [head]
    for name, found in report.by_dataset.items():
        known = (found.router, found.single, found.simple)
        unseen = (found.left_out, found.left_out_single, found.left_out_simple)
        rows.append((name, str(found.num_rows), *(shown(value) for value in known), *(shown(value) for value in unseen)))
    return rows


def _points(e: Estimate) -> str:
    return f"{100 * e.mean:+.2f} [{100 * e.low:+.2f}, {100 * e.high:+.2f}]"
