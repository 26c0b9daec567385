"""The model card of a router artifact: every figure that a person needs before trusting it (control speed, offline).

Must not know: how figures are computed.
"""

from __future__ import annotations

from collections.abc import Sequence

from antiphon.coe.judging.report import Report
from antiphon.coe.judging.tables import dataset_rows, policy_rows, rows_for_people
from antiphon.coe.routing.artifact import Artifact


def model_card(artifact: Artifact, report: Report | None) -> str:
    """Markdown; ``report`` None when training was told not to judge."""
    training = artifact.training
    lines = ["# Composition-of-experts router", ""]
    lines += _table(
        ("what", "value"),
        [
            ("prompts", f"{training['table']['num_prompts']} in {len(training['datasets'])} datasets"),
            ("source", training["table"]["source"] or "not said"),
            ("table digest", training["table"]["digest"]),
            ("duplicates dropped", str(training["duplicates"]["num_exact"])),
            ("prompts in more than one dataset", str(training["duplicates"]["num_across_datasets"])),
            ("categories", f"{', '.join(artifact.categories)} ({training['labels']['how']})"),
            ("prompts without category", str(training["labels"]["num_unlabelled"])),
            ("embedder", training["embedder"]),
            ("slow path", "yes" if artifact.slow is not None else "no"),
            ("seed", str(training["recipe"]["seed"])),
            ("general expert", artifact.expert_names[artifact.general]),
            ("cost unit", training["cost_unit"]),
        ],
    )
    lines += ["", "## Policies", "", "Figures of rows that the fitted models had not seen.", ""]
    rows: list[tuple[str, ...]] = []
    for name, index in sorted(artifact.policies.items()):
        point = artifact.frontier[index]
        experts = ", ".join(artifact.expert_names[m] for m in point.experts)
        rows.append((name, f"{point.weight:g}", f"{point.score:.4f}", f"{point.avg_cost:.1f}", experts))
    lines += _table(("policy", "cost weight", "score", "average cost", "experts"), rows)
    lines += ["", "## Categories", ""]
    scores_CM = artifact.fast.fitted.category_scores_CM
    lines += _table(
        ("category", "mapped to", *artifact.expert_names),
        [
            (category, artifact.expert_names[artifact.mapping[c]], *(f"{score:.3f}" for score in scores_CM[c]))
            for c, category in enumerate(artifact.categories)
        ],
    )
    gate = artifact.fast.gate
    lines += ["", f"Gate: familiarity below {gate.threshold:.3f} goes to the general expert.", ""]
    if report is not None:
        lines[-1:] = [
            f"It closed on {100 * report.gate_rate:.0f} % of prompts of known kinds"
            + (
                "."
                if report.gate_rate_left_out is None
                else f" and on {100 * report.gate_rate_left_out:.0f} % of datasets not seen."
            ),
            "",
        ]
    if report is None:
        lines += ["This router has not been judged."]
    else:
        lines += ["## Judged", "", "Five folds by prompt, and each dataset left out in turn; 95 % bootstrap intervals.", ""]
        lines += [
            "Every fold fits and chooses on its own rows alone: temperatures, mix, experts and costs on models of inner folds, ",
            "the gate's threshold on models that each left out one more dataset. No judged row was seen by any of these choices.",
            "",
        ]
        lines += _table(("what", "value"), rows_for_people(report))
        head, *rows = policy_rows(report)
        lines += ["", "### Policies against other routers, in points with 95 % intervals", "", *_table(head, rows)]
        head, *rows = dataset_rows(report)
        lines += ["", "### Datasets", "", *_table(head, rows)]
        lines += ["", *(f"![{name}]({name}.png)" for name in ("quality-cost", "calibration", "confusion"))]
    return "\n".join(lines) + "\n"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(head), "|" + "---|" * len(head), *(line(row) for row in rows)]
