"""Requests, their sampling parameters and what comes back: the values between gateway and engine (request speed).

The life of a request inside one engine (``RequestStatus``):

    WAITING ──────────────► RUNNING ───────────────► FINISHED_STOPPED | FINISHED_LENGTH
       │  ▲                 │     ▲
       │  │ KV failed       │     │ blocks are free again
       ▼  │                 ▼     │
    WAITING_FOR_REMOTE_KV   PREEMPTED
       │
       └── KV arrived ────► RUNNING

Every state that is not FINISHED_* may go to FINISHED_ABORTED (cancel, disconnect, deadline) or FINISHED_ERROR.

Must not know: how tokens are computed, text, or any transport.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NewType

from antiphon.core.errors import ErrorInfo

RequestId = NewType("RequestId", str)


class RequestStatus(enum.Enum):
    """Where a request stands in its engine; drawn in the module's docstring."""

    WAITING = "waiting"
    WAITING_FOR_REMOTE_KV = "waiting_for_remote_kv"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED_STOPPED = "finished_stopped"
    FINISHED_LENGTH = "finished_length"
    FINISHED_ABORTED = "finished_aborted"
    FINISHED_ERROR = "finished_error"


class FinishReason(enum.Enum):
    """Why a request ended, in OpenAI's words where it has one."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


FINISH_REASON: Mapping[RequestStatus, FinishReason] = {
    RequestStatus.FINISHED_STOPPED: FinishReason.STOP,
    RequestStatus.FINISHED_LENGTH: FinishReason.LENGTH,
    RequestStatus.FINISHED_ABORTED: FinishReason.ABORT,
    RequestStatus.FINISHED_ERROR: FinishReason.ERROR,
}

MAX_LOGPROBS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinkingRules:
    """How long the model may think. A thought lasts from ``start`` (or the prompt's end, with ``is_open``) to ``end``."""

    start: str
    end: str
    end_token_ids: tuple[int, ...]  # what ends a thought by force
    budget_tokens: int
    is_open: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputRules:
    """What an output must be. Who enforces it needs nothing but the rules and the output's ids so far, wherever those were made."""

    grammar: str | None = None  # in llguidance's Lark; compiled and found affordable by the gateway
    thinking: ThinkingRules | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooling:
    """A vector is wanted of the prompt, and no token: an embedding, or the scores of a pair of texts."""

    kind: Literal["embed", "score"]
    token_ids: tuple[int, ...] = ()  # score: their logits behind the prompt; empty = the model's own classes
    num_first_tokens: int | None = None  # of a pair's first text, for encoders that tell the two apart; None = one text


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen. Ranges are checked by the gateway, which owns the error with the field's name.

    The order of operations is: penalties, logit_bias, temperature, top_k, top_p, min_p, draw (as in transformers). A draw depends
    on nothing but (seed, position in the output, logits), so equal seeds give equal tokens in any batch or topology.
    """

    max_tokens: int
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0  # 1 = off
    top_k: int = 0  # 0 = off
    min_p: float = 0.0  # 0 = off
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0  # 1 = off; over prompt and output, as in transformers
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0  # unsigned 64-bit; the gateway draws one when the caller gives none
    stop_token_ids: frozenset[int] = frozenset()  # in addition to the model's end-of-sequence ids
    min_tokens: int = 0  # end-of-sequence and stop ids are masked before this many output tokens
    ignore_eos: bool = False
    num_logprobs: int | None = None  # None = none, 0 = the sampled token's only, at most MAX_LOGPROBS
    num_prompt_logprobs: int | None = None  # the same for the prompt's tokens; the prompt is then computed whole
    rules: OutputRules | None = None
    pooling: Pooling | None = None  # with max_tokens 1, whose place the vector takes
    speculates: bool = True  # where the deployment does; the tokens are the same either way

    @property
    def greedy(self) -> bool:
        """True when the most probable token is always taken."""
        return self.temperature == 0.0

    def draws_from_logits_alone(self, position: int) -> bool:
        """Whether the output's token at ``position`` depends on its logits and the seed alone, and nothing else is asked of them:
        no penalty, bias, mask, rule or log-probability.
        """
        is_penalised = self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0
        is_changed = is_penalised or bool(self.logit_bias) or position < self.min_tokens or self.rules is not None
        return not is_changed and self.num_logprobs is None and self.pooling is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What an engine is asked to do: continue these tokens.

    ``output_token_ids`` are tokens that an earlier, lost worker already produced for this request: they count as
    output (positions of seeded draws, penalties, max_tokens) and are not emitted again.
    """

    request_id: RequestId
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    eos_token_ids: frozenset[int] = frozenset()
    output_token_ids: tuple[int, ...] = ()
    arrival_s: float = 0.0  # engine clock, monotonic
    deadline_s: float | None = None  # engine clock; None = no deadline
    priority: int = 0  # smaller runs earlier
    prefill_worker: str | None = None  # worker id of a prefill worker worth using; None = prefill here
    traceparent: str | None = None  # W3C trace context of the caller
    cache_salt: str = ""  # separates prefix caches, e.g. by tenant
    tenant: str = ""  # whose request it is; tenants take turns


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """Log-probabilities at one output position: the chosen token's, and the most probable alternatives'."""

    token_id: int
    logprob: float
    rank: int  # 0 = most probable
    top: tuple[tuple[int, float], ...] = ()  # (token id, log-probability), most probable first


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTimes:
    """Seconds on the engine's monotonic clock; None = has not happened."""

    arrival_s: float
    scheduled_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """What one step added to one request."""

    request_id: RequestId
    new_token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()  # one per new token when asked for
    finish_reason: FinishReason | None = None
    error: ErrorInfo | None = None  # with FinishReason.ERROR, and the reason of an ABORT (e.g. deadline_exceeded)
    stop_token_id: int | None = None  # the id that stopped it, when one did
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache
    num_remote_tokens: int = 0  # prompt tokens whose KV came from a prefill worker
    num_preemptions: int = 0
    times: RequestTimes | None = None  # with the finish
    prompt_logprobs: Mapping[int, TokenLogprob] = field(default_factory=dict)  # by position in the prompt, from 1 on
    vector: tuple[float, ...] = ()  # of a request with pooling, with the finish
    traceparent: str | None = None  # the request's, with the finish
