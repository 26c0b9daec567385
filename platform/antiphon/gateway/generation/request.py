"""What a client asked for and what it gets, whichever door it came through (values; request speed).

    GenerationRequest ──► Generator.generate() ──► Started, ChoiceDelta ..., Completed

Must not know: HTTP, grpc, or workers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from antiphon.core.request import FinishReason, OutputRules, SamplingParams
from antiphon.gateway.text.chat_options import ChatOptions, ToolCall
from antiphon.gateway.text.parts import Part

# What a checkpoint's generation_config.json may decide where the client does not, and the values that make sense.
SAMPLING_DEFAULTS: Mapping[str, tuple[float, float]] = {
    "temperature": (0.0, 2.0),
    "top_p": (1e-6, 1.0),
    "top_k": (0, 2**31 - 1),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-3, 10.0),
}
MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_CHOICES = 128  # prompts x n
MAX_REQUEST_ID_CHARS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPrompt:
    """Text to continue; ``field`` is its path in the request, for errors. ``suffix``: what stands behind the answer."""

    text: str
    suffix: str | None = None
    field: str = "prompt"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPrompt:
    """Tokens to continue."""

    token_ids: tuple[int, ...]
    field: str = "prompt"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatMessage:
    """One message of a chat."""

    role: str
    content: str
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    reasoning: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    """A chat to answer."""

    messages: tuple[ChatMessage, ...]
    add_generation_prompt: bool = True
    continue_final_message: bool = False  # the last message is the beginning of the answer
    variables: Mapping[str, Any] = field(default_factory=dict)  # of the chat template
    field: str = "messages"


Prompt = TextPrompt | TokenPrompt | ChatPrompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """SamplingParams as far as the client decides them; ranges are checked at the doors."""

    max_tokens: int | None = None  # None = what fits into the model's context
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None  # unsigned 64-bit; None = the gateway draws one
    stop_token_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    ignore_eos: bool = False
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    speculates: bool = True
    unset: frozenset[str] = frozenset()  # fields that the client left to the model's own defaults

    def with_defaults(self, defaults: Mapping[str, float]) -> Sampling:
        """With the model's values where the client gave none; ``defaults`` by this class's field names."""
        changes: dict[str, Any] = {name: value for name, value in defaults.items() if name in self.unset}
        return replace(self, **changes) if changes else self

    def resolve(self, *, max_tokens: int, seed: int, rules: OutputRules | None = None) -> SamplingParams:
        """What the engine of one choice is told."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=self.logit_bias,
            seed=seed % 2**64,
            stop_token_ids=self.stop_token_ids,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            num_logprobs=self.num_logprobs,
            num_prompt_logprobs=self.num_prompt_logprobs,
            rules=rules,
            speculates=self.speculates,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One call. Choice ``p * n + i`` is the i-th continuation of prompt p and draws with seed + its index."""

    request_id: str
    model: str
    prompts: tuple[Prompt, ...]
    sampling: Sampling
    operation: Literal["chat", "text_completion"]
    n: int = 1
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    stream: bool = False
    deadline_s: float | None = None  # seconds from now; None = the gateway's default
    priority: int = 0
    cache_salt: str = ""
    tenant: str = ""  # whose key it came with; "" where no keys are asked for
    traceparent: str | None = None
    placement_timeout_s: float | None = None  # patience while no worker can take it; None = the gateway's
    resume: Mapping[int, tuple[int, ...]] = field(default_factory=dict)  # tokens the client has, by choice
    token_by_token: bool = False  # a delta for each token, also where a step gave several
    options: ChatOptions = field(default_factory=ChatOptions)
    # Paths of fields in the door's own message, for errors found later.
    max_tokens_field: str = "max_tokens"
    sampling_prefix: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenProbability:
    """A token and its log-probability."""

    token_id: int
    text: str
    raw: bytes
    logprob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprob:
    """The probabilities at one position."""

    chosen: TokenProbability
    rank: int
    top: tuple[TokenProbability, ...]
    is_first: bool = False  # of a prompt: nothing came before it, so it has none


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The request was taken in by a worker, or waits for one to come back."""

    request_id: str
    model: str
    seed: int
    num_prompt_tokens: int
    created: int  # seconds since 1970
    prompt_texts: tuple[str, ...]  # decoded, by prompt, for echo


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceDelta:
    """What was added to a choice."""

    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Logprob, ...] = ()  # one per token id when asked for
    text_offsets: tuple[int, ...] = ()  # one per token id: where it stands in the choice's text
    finish_reason: FinishReason | None = None  # STOP or LENGTH, on the last one
    stop_string: str | None = None
    stop_token_id: int | None = None  # set only when the client named it
    parts: tuple[Part, ...] | None = None  # what the text means, where it is read for calls and thoughts; None = it is all text
    prompt_logprobs: tuple[Logprob, ...] = ()  # when asked for, once, before the first token: one per token of the prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Figures of a finished request."""

    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int
    num_remote_tokens: int
    num_resumptions: int
    first_token_s: float
    finished_s: float
    num_thought_tokens: int = 0  # of the completion's


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """All choices are finished."""

    usage: Usage


Event = Started | ChoiceDelta | Completed
