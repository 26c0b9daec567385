"""What a drafter is asked and what it answers: guesses of a request's next tokens (step speed, values).

Must not know: who makes them, how they are verified.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from antiphon.core.request import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftAsked:
    """What is asked of a drafter for one request. ``token_ids`` is the request's own list: it is read, and not kept."""

    token_ids: Sequence[int]  # prompt and output so far
    num_drafts: int  # at most, 1 or more
    num_output_tokens: int = 0  # of them; the place of the next draw
    sampling: SamplingParams | None = None  # how it is drawn; None = the most likely token


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """The tokens that may come next, in order. Drafts of equal confidence are accepted about equally often."""

    token_ids: tuple[int, ...]
    confidences: tuple[int, ...] = ()  # of each of them an index into the drafter's ``priors``; () = the first, of all
