"""Shapes of what the HTTP doors answer, for ``/openapi.json`` (values; request speed). Must not know: how an answer comes about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

from antiphon.core.worker_info import WorkerInfo
from antiphon.gateway.compositions import CompositionStatus
from antiphon.gateway.status import PoolStatus

Reason = Literal["stop", "length", "tool_calls", "function_call", "abort", "error"]


class ErrorFacts(BaseModel):
    """What went wrong: ``param`` names the field, ``code`` is stable."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """Every error of this door."""

    error: ErrorFacts


class AnthropicErrorFacts(BaseModel):
    """What went wrong, in Anthropic's words."""

    type: str
    message: str


class AnthropicErrorBody(BaseModel):
    """Every error of Anthropic's door."""

    type: Literal["error"]
    error: AnthropicErrorFacts


class ModelCard(BaseModel):
    """A model: ``max_model_len`` is the longest prompt plus answer, null while no worker of it is registered."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None = None
    task: Literal["generate", "embed", "rerank"]


class ModelList(BaseModel):
    """The models served here."""

    object: Literal["list"]
    data: list[ModelCard]


class PromptTokens(BaseModel):
    """Of the prompt's tokens, those found in a cache."""

    cached_tokens: int


class CompletionTokens(BaseModel):
    """Of the answer's tokens, those of thoughts."""

    reasoning_tokens: int


class UsageBody(BaseModel):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens
    completion_tokens_details: CompletionTokens


class CalledBody(BaseModel):
    """A function and its arguments, JSON text."""

    name: str | None = None
    arguments: str


class WrittenBody(BaseModel):
    """A custom tool and its text."""

    name: str | None = None
    input: str


class AnsweredCall(BaseModel):
    """A call of a tool; one of ``function`` and ``custom`` is there, by its type."""

    id: str
    type: Literal["function", "custom"]
    function: CalledBody | None = None
    custom: WrittenBody | None = None


class CallDelta(BaseModel):
    """A part of a call; ``index`` says of which."""

    index: int
    id: str | None = None
    type: Literal["function", "custom"] | None = None
    function: CalledBody | None = None
    custom: WrittenBody | None = None


class TokenLogprobBody(BaseModel):
    """One token's log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TokenLogprobBody):
    """A sampled token, and the most probable in its place."""

    top_logprobs: list[TokenLogprobBody]


class ChatLogprobs(BaseModel):
    """Log-probabilities of an answer's tokens."""

    content: list[ChatTokenLogprob]
    refusal: None


class CompletionLogprobs(BaseModel):
    """The same as completions have them; the sampled token is among its place's ``top_logprobs``."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class AnsweredMessage(BaseModel):
    """What the assistant says; thoughts come apart, under both names that clients know."""

    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    tool_calls: list[AnsweredCall] | None = None
    function_call: CalledBody | None = None  # in place of tool_calls where functions were given
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Ending(BaseModel):
    index: int
    finish_reason: Reason | None
    stop_reason: str | int | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None


class ChatChoice(_Ending):
    """One answer."""

    message: AnsweredMessage
    logprobs: ChatLogprobs | None


class CompletionChoice(_Ending):
    """One completion, or a part of it in a stream."""

    text: str
    logprobs: CompletionLogprobs | None


class ChatDelta(BaseModel):
    """What is new of an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: str | None = None
    tool_calls: list[CallDelta] | None = None
    function_call: CalledBody | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class ChatChunkChoice(_Ending):
    """A part of one answer."""

    delta: ChatDelta
    logprobs: ChatLogprobs | None


class _Head(BaseModel):
    id: str
    created: int
    model: str
    system_fingerprint: None


class ChatCompletion(_Head):
    """A whole answer."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: UsageBody


class ChatChunk(_Head):
    """An event of a streamed answer; the last one before [DONE] has the usage where it was asked for."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: UsageBody | None = None


class Completion(_Head):
    """Completions, whole or an event of a stream."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: UsageBody | None = None


class Tokens(BaseModel):
    """A prompt's tokens."""

    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizedText(BaseModel):
    """What tokens say."""

    prompt: str


class InputTokens(BaseModel):
    """How many tokens a message is."""

    input_tokens: int


class MessageUsage(BaseModel):
    """Tokens read and written, as Anthropic counts them."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class AnsweredBlock(BaseModel):
    """A block of the answer; which fields there are follows from ``type``."""

    type: Literal["text", "thinking", "tool_use"]
    text: str | None = None
    thinking: str | None = None
    signature: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None


class AnsweredMessages(BaseModel):
    """A whole answer in Anthropic's shape."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[AnsweredBlock]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None
    stop_sequence: str | None
    usage: MessageUsage


class AnsweredResponse(BaseModel):
    """A response; its items are OpenAI's: reasoning, message, function_call, custom_tool_call."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete"]
    error: None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    output: list[dict[str, Any]]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, Any]
    store: bool
    temperature: float | None
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_p: float | None
    truncation: str
    usage: dict[str, Any] | None
    metadata: dict[str, Any]


class DeletedResponse(BaseModel):
    """A response that is kept no longer."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]


class ItemList(BaseModel):
    """A page of what a response answered."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ResponseInputTokens(BaseModel):
    """How many tokens a request's prompt has."""

    object: Literal["response.input_tokens"]
    input_tokens: int


class NamedEvent(BaseModel):
    """An event of a stream; its other fields follow from ``type``."""

    type: str


class Alive(BaseModel):
    """The process answers."""

    status: Literal["ok"]


class Readiness(BaseModel):
    """Whether this gateway should get traffic, or why not; where a revision was named, which one runs here.

    ``revisions`` counts the workers that take work, by pool and by the revision that they run.
    """

    status: str
    ready_workers: int
    revision: str | None = None
    revisions: dict[str, dict[str, int]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerBody(WorkerInfo):
    """A worker: its record, its lease, and this gateway's session with it (null = a role that takes no requests)."""

    lease_remaining_s: float
    connected: bool | None
    num_requests: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusBody:
    """What a gateway sees."""

    version: str
    uptime_s: float
    num_requests: int
    draining: bool
    pools: tuple[PoolStatus, ...]
    workers: tuple[WorkerBody, ...]
    compositions: tuple[CompositionStatus, ...] = ()


class ExpertRows(BaseModel):
    """Rows that each expert had since start, by layer."""

    deployment: str
    placement: int
    rows: dict[str, list[int]]
