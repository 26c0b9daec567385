"""The seam behind which drafts are made: who proposes a request's next tokens (step speed).

A draft is a guess and nothing else: the model's own draw decides at every place, so a drafter changes what a step costs and never
what it answers. Must not know: blocks, budgets, how drafts are verified.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from antiphon.core.request import RequestId


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftAsked:
    """What is asked of a drafter for one request. ``token_ids`` is the request's own list: it is read, and not kept."""

    token_ids: Sequence[int]  # prompt and output so far
    num_drafts: int  # at most, 1 or more


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """The tokens that may come next, in order. Proposals of equal ``confidence`` are accepted about equally often."""

    token_ids: tuple[int, ...]
    confidence: int = 0  # an index into the drafter's ``priors``


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
        """By confidence, the share of drafts that are taken, before anything was measured."""
        ...

    def propose(self, asked: Mapping[RequestId, DraftAsked]) -> Mapping[RequestId, Proposal]:
        """Proposals of at most so many tokens as asked for; a request without one is left out."""
        ...

    def forget(self, request_id: RequestId) -> None:
        """The request has ended; unknown ids are ignored."""
        ...
