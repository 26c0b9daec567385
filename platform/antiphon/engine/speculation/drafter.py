"""The seam behind which drafts are made: who proposes a request's next tokens (step speed).

A draft is a guess and nothing else: the model's own draw decides at every place, so a drafter changes what a step costs and never
what it answers. A drafter that keeps something of a request (KV of its own, the model's hidden states) compares what it kept with
the tokens that it is told at every asking: nobody reports to it which drafts were taken, which request was preempted, moved or
resumed elsewhere. What it has lost it computes again or goes without, and proposes worse for a while.
Must not know: blocks, budgets, how drafts are verified.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from antiphon.core.drafts import DraftAsked, Proposal
from antiphon.core.request import RequestId

__all__ = ["DraftAsked", "Drafter", "Proposal"]


class Drafter(Protocol):
    """Proposes. Belongs to the engine's loop."""

    @property
    def name(self) -> str:
        """As the document and the metrics call it."""
        ...

    @property
    def is_free(self) -> bool:
        """Whether asking costs nothing worth counting; it is then asked at every step, and watched where its drafts aren't used."""
        ...

    @property
    def priors(self) -> Sequence[float]:
        """By confidence, the share of drafts that are taken where those before them were, before anything was measured."""
        ...

    def propose(self, asked: Mapping[RequestId, DraftAsked]) -> Mapping[RequestId, Proposal]:
        """Proposals of at most so many tokens as asked for; a request without one is left out."""
        ...

    def forget(self, request_id: RequestId) -> None:
        """The request has ended; unknown ids are ignored."""
        ...
