"""One step of an engine: what was decided (SchedulerOutput), what came of it (ModelRunnerOutput): ints, no tensors (step speed).

There is no prefill or decode phase: each request's computed tokens catch up with its known tokens, and a step schedules some
tokens of some requests. New requests travel whole, old ones as differences. Must not know: who computes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from antiphon.core.errors import ErrorInfo
from antiphon.core.kv import KVLoad, KVTarget, TransferId
from antiphon.core.request import Request, RequestId, SamplingParams, TokenLogprob


@dataclass(frozen=True, slots=True, kw_only=True)
class StateSnapshot:
    """Keep the state behind the first ``end_token`` tokens in ``slot``; of no use where they turn out to be wrong guesses."""

    end_token: int
    slot: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StateStep:
    """Where a request's state is before a step and goes in it. What is read is not written: a step may be computed twice, and where
    guesses were wrong the state that goes to ``write`` is made again from there.
    """

    read: int | None  # slot; None = no token is computed yet
    write: int  # slot; the one read where the step computes no token of the request
    snapshots: tuple[StateSnapshot, ...] = ()  # in the order of their ends


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRequestData:
    """A request the runner does not know (new, or resumed after a preemption)."""

    request_id: RequestId
    token_ids: tuple[int, ...]  # prompt and output so far
    num_prompt_tokens: int
    block_ids: tuple[int, ...]
    num_computed_tokens: int
    sampling: SamplingParams
    eos_token_ids: frozenset[int]
    kv_target: KVTarget | None = None  # set: compute only, never sample, hand the KV over


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedRequestData:
    """A request the runner knows: what changed since its last step."""

    request_id: RequestId
    new_block_ids: tuple[int, ...]
    num_computed_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafts:
    """Guesses of a request's next tokens, computed in the step as decode rows of growing length behind its last known token.

    Each row sees the KV of those before it. The runner draws at every place as it would have without them, and goes on for as long
    as what it drew is the draft. Afterwards both sides keep the blocks of the tokens that are then known, and no more.
    """

    token_ids: tuple[int, ...]
    new_block_ids: tuple[int, ...] = ()  # besides those of the request's own data


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerOutput:
    """The decision for one step."""

    step_id: int
    new_requests: tuple[NewRequestData, ...] = ()
    cached_requests: tuple[CachedRequestData, ...] = ()
    num_scheduled_tokens: dict[RequestId, int] = field(default_factory=dict)  # in batch order; drafts included
    drafts: dict[RequestId, Drafts] = field(default_factory=dict)
    finished_request_ids: tuple[RequestId, ...] = ()  # finished or preempted since the last step: forget them
    kv_loads: tuple[KVLoad, ...] = ()
    kv_load_aborts: tuple[RequestId, ...] = ()
    states: dict[RequestId, StateStep] = field(default_factory=dict)  # of every request scheduled, where the model has states

    @property
    def num_tokens(self) -> int:
        """Tokens scheduled in this step."""
        return sum(self.num_scheduled_tokens.values())

    @property
    def has_work(self) -> bool:
        """True when the runner has anything to do."""
        return bool(self.num_scheduled_tokens or self.finished_request_ids or self.kv_loads or self.kv_load_aborts)


@dataclass(frozen=True, slots=True, kw_only=True)
class KVEvents:
    """What the KV hand-off saw since it was last asked."""

    loaded: tuple[RequestId, ...] = ()  # decode side: all KV is in its blocks
    failed: tuple[tuple[RequestId, str], ...] = ()  # decode side: recompute here; why
    sent: tuple[RequestId, ...] = ()  # prefill side: handed over, blocks may go
    arrived: tuple[Request, ...] = ()  # prefill side: asked for
    targets: dict[RequestId, KVTarget] = field(default_factory=dict)  # of the arrived ones
    aborted: tuple[RequestId, ...] = ()  # prefill side: the asker is gone or no longer wants it

    @property
    def empty(self) -> bool:
        """True when nothing happened."""
        return not (self.loaded or self.failed or self.sent or self.arrived or self.aborted)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRunnerOutput:
    """What came of one step."""

    sampled_token_ids: dict[RequestId, tuple[int, ...]] = field(default_factory=dict)  # the next token, and one per draft taken
    logprobs: dict[RequestId, tuple[TokenLogprob, ...]] = field(default_factory=dict)  # one per sampled token where asked for
    prompt_logprobs: dict[RequestId, dict[int, TokenLogprob]] = field(default_factory=dict)  # by position in the prompt
    vectors: dict[RequestId, tuple[float, ...]] = field(default_factory=dict)  # of requests with pooling, beside a token 0
    errors: dict[RequestId, ErrorInfo] = field(default_factory=dict)  # requests that can't go on, and why
    kv: KVEvents = field(default_factory=KVEvents)


__all__ = [
    "CachedRequestData",
    "Drafts",
    "KVEvents",
    "ModelRunnerOutput",
    "NewRequestData",
    "SchedulerOutput",
    "StateSnapshot",
    "StateStep",
    "TransferId",
]
