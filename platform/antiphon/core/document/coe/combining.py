"""Part of a composition's document about asking more than one expert: cascades, votes, declining (control speed).

Must not know: experts' own fields, routers.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from antiphon.core.document.coe.experts import Name
from antiphon.core.document.part import Model, as_tuple


class CheckSpec(Model):
    """How far the log-probability of an expert's answer speaks for it; ``antiphon coe calibrate`` makes it from scored answers."""

    expert: Name = Field(description="The expert.")
    weight: float = Field(ge=0, le=1000, description="Log-odds of a good answer, per unit of mean log-probability of its tokens.")
    bias: float = Field(ge=-1000, le=1000, description="Log-odds of a good answer whose tokens were all certain.")


class CombineSpec(Model):
    """More than one expert for a request that no rule, mapping or header decides."""

    mode: Literal["cascade", "vote"] = Field(
        description="cascade: one after the other until a check accepts an answer; vote: all at once, the answer that most give."
    )
    experts: tuple[Name, ...] = Field(
        description="Who is asked: for a cascade in this order, the cheap ones first; for a vote, ties go to the earlier.",
        min_length=2, max_length=8,
    )  # fmt: skip
    accept: float = Field(default=0.7, gt=0, lt=1, description="cascade: chance of a good answer from which it is taken.")
    checks: tuple[CheckSpec, ...] = Field(
        default=(), max_length=8,
        description="cascade: the check of each expert; with otherwise answer, the last one needs none.",
    )  # fmt: skip
    compare: Literal["whole", "last-line", "last-number"] = Field(
        default="whole", description="vote: what of two answers must be equal, but for case, spaces and marks at the ends."
    )
    min_votes: int = Field(default=2, ge=1, le=8, description="vote: so many must agree.")
    otherwise: Literal["answer", "decline"] = Field(
        default="answer",
        description="Without an accepted answer: the last (cascade) or most voted for (vote) one stands, or it is declined.",
    )
    max_tokens: int | None = Field(
        default=None, ge=1, le=1_000_000_000,
        description="Prompt and output tokens of one request over all experts: once used, nobody more is asked; None = no limit.",
    )  # fmt: skip
    step_timeout_s: float = Field(default=60.0, gt=0, le=3600, description="An expert that has not finished by then has failed.")

    _lists = field_validator("experts", "checks", mode="before")(as_tuple)

    @model_validator(mode="after")
    def _fits(self) -> CombineSpec:
        if len(set(self.experts)) < len(self.experts):
            raise ValueError("experts: each one is asked once")
        if self.mode == "vote" and self.min_votes > len(self.experts):
            raise ValueError("minVotes: there are not so many experts")
        if self.mode == "cascade":
            checked = self.experts if self.otherwise == "decline" else self.experts[:-1]
            for name in checked:
                if self.check(name) is None:
                    raise ValueError(f"checks: a cascade needs a check for {name!r}")
        return self

    def check(self, expert: str) -> CheckSpec | None:
        """The expert's check, if it has one."""
        return next((check for check in self.checks if check.expert == expert), None)
