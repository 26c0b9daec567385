"""What drafts do to a decode step: rows that it computes, and tokens that come of it, per request (control speed).

A request has the row of its next token and one of each draft. A draft is taken where all before it were, each with the same chance,
so that a step brings 1 + a + a^2 + ... + a^k tokens. Every row reads the whole context of its request, as when serving.
Must not know: who drafts, engines.
"""

from __future__ import annotations

from dataclasses import dataclass

from antiphon.planner.cost.formula import Apply, formula, plainly


@formula("", drafts="", acceptance="")
def tokens_of_step(*, drafts: float, acceptance: float) -> float:
    """Tokens that a step of one request brings on average: drafts up to the first that is not taken, and the one after."""
    return (1 - acceptance ** (drafts + 1)) / (1 - acceptance)  # type: ignore[no-any-return]  # a power of floats may be complex


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """How requests speculate; with no drafts they don't."""

    drafts: int = 0  # of each request in each step
    acceptance: float = 0.0  # chance that a draft is taken, given those before it; below 1
    drafting: float = 0.0  # time to make a step's drafts, as a share of the step that verifies them

    @property
    def rows(self) -> int:
        """Rows of a request in a step."""
        return 1 + self.drafts

    def tokens(self, apply: Apply = plainly) -> float:
        """Tokens of a request that a step brings on average."""
        return apply(tokens_of_step, drafts=self.drafts, acceptance=self.acceptance) if self.drafts else 1.0


NO_SPECULATION = Speculation()
