"""One request as the attention worker knows it: its tokens, its blocks, what its sampling remembers (step).

Must not know: queues, budgets, how rows are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from antiphon.core.errors import StructureRefused
from antiphon.core.step import NewRequestData, StateStep
from antiphon.models.attention.states import StateRun
from antiphon.models.decoder import StepState
from antiphon.worker.cards.drawing import Draw
from antiphon.worker.sampler import SamplingState
from antiphon.worker.structure.enforcer import Enforcer
from antiphon.worker.ubatches.plan import Segment


class RequestRow:
    """Mutable; belongs to the worker's loop."""

    __slots__ = (
        "bad_at",
        "block_ids",
        "kv_target",
        "num_computed_tokens",
        "num_prompt_tokens",
        "request_id",
        "sampling",
        "state",
        "token_ids",
    )

    def __init__(self, new: NewRequestData, vocab_size: int, enforcer: Enforcer | None) -> None:
        """Raises StructureRefused where its rules can't be enforced."""
        self.request_id = new.request_id
        self.bad_at: str | None = None  # where this request's rows were first seen not to be numbers
        self.token_ids = list(new.token_ids)
        self.num_prompt_tokens = new.num_prompt_tokens
        self.block_ids = list(new.block_ids)
        self.num_computed_tokens = new.num_computed_tokens
        self.kv_target = new.kv_target
        self.state: StateStep | None = None  # of the step that is computed, where the model has states
        output = self.token_ids[self.num_prompt_tokens :]
        matcher = meter = None
        if new.sampling.rules is not None and new.kv_target is None:
            if enforcer is None:
                raise StructureRefused("this worker has no vocabulary to enforce a grammar with", "grammar")
            matcher, meter = enforcer.begin(new.sampling.rules, new.eos_token_ids, output)
        prompt = self.token_ids[: self.num_prompt_tokens]
        self.sampling = SamplingState(new.sampling, new.eos_token_ids, prompt, output, vocab_size, matcher=matcher, meter=meter)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated, those of an earlier worker included."""
        return len(self.token_ids) - self.num_prompt_tokens

    def draw_at(self, token: int) -> Draw | None:
        """How a card draws the token that follows number ``token``; None where it does not, or none is drawn there."""
        position = token + 1 - self.num_prompt_tokens
        return None if position < self.num_output_tokens else self.sampling.draw_at(position)

    def note_bad(self, state: StepState, start: int, end: int) -> None:
        """Remember where rows [start, end) of the ubatch, which are this request's, were first seen not to be numbers."""
        if self.bad_at is None:
            self.bad_at = next((gate for at, gate in state.bad_rows.items() if start <= at < end), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduled:
    """A request and how many of its tokens a step computes."""

    row: RequestRow
    num_tokens: int
    drafts: tuple[int, ...] = ()  # the last of the tokens: guesses behind the last known one, which is scheduled too

    @property
    def is_decode(self) -> bool:
        """Whether its rows see a context of their own each: the last known token, and drafts."""
        return self.num_tokens == 1 + len(self.drafts)

    def segments(self, request: int) -> Sequence[Segment]:
        """Its rows, of request number ``request`` of the batch; drafts one by one."""
        first = self.row.num_computed_tokens
        if self.drafts:
            return [Segment(request=request, first_token=first + i, num_tokens=1) for i in range(self.num_tokens)]
        return [Segment(request=request, first_token=first, num_tokens=self.num_tokens)] if self.num_tokens > 0 else ()

    def state_run(self, first_token: int, num_tokens: int, blank: int) -> StateRun | None:
        """Where these of its rows find its state and leave it; None where the model has none. ``blank``: slot of zeros."""
        row = self.row
        if row.state is None:
            return None
        computed = row.num_computed_tokens
        return StateRun.of(row.state, computed, first_token, num_tokens, blank, has_guesses=bool(self.drafts))

    def without_drafts(self) -> Scheduled:
        """The same, guessing nothing."""
        return Scheduled(row=self.row, num_tokens=self.num_tokens - len(self.drafts))
