"""A decision's record as JSON values: for Explain, the command line and logs (request speed).

Must not know: who asks.
"""

from __future__ import annotations

from typing import Any

from antiphon.coe.routing.router import Record


def record_json(record: Record) -> dict[str, Any]:
    """Everything but times, so that equal decisions give equal JSON; numbers are rounded to six places."""
    decision, judgement = record.decision, record.judgement
    return {
        "decision_id": record.decision_id,
        "expert": decision.expert,
        "reason": decision.reason.value,
        "detail": decision.detail,
        "policy": decision.policy,
        "runner_up": decision.runner_up,
        "alternatives": list(decision.alternatives),
        "category": decision.category,
        "confidence": round(decision.confidence, 6),
        "familiarity": round(decision.familiarity, 6),
        "slow_path": decision.slow,
        "probabilities": {} if judgement is None else {k: round(p, 6) for k, p in judgement.probabilities.items()},
        "candidates": [
            {
                "expert": c.expert,
                "score": round(c.score, 6),
                "cost": round(c.cost, 6),
                "wait": round(c.wait, 6),
                "lead": round(c.lead, 6),
                "total": None if c.total is None else round(c.total, 6),
                "blocked_by": None if c.block is None else c.block.value,
            }
            for c in decision.candidates
        ],
        "artifact": record.artifact_digest,
        "view_version": record.view.version,
    }
