"""Bodies of OpenAI's requests, strictly typed, to GenerationRequest (request speed).

A field that would change the result and isn't supported is refused by name, as is a field nobody knows; fields without influence
on the result (user, metadata, store, ...) are taken and ignored; null stands for absent. Beyond OpenAI's there are vLLM's
extensions top_k, min_p, repetition_penalty, ignore_eos, min_tokens, stop_token_ids, include_stop_str_in_output,
skip_special_tokens, add_generation_prompt, chat_template_kwargs, priority and cache_salt.

Must not know: HTTP, tokenizers or workers.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    field_validator,
    model_validator,
)

from antiphon.core.errors import InvalidInput
from antiphon.core.request import MAX_LOGPROBS
from antiphon.gateway.generation.request import (
    MAX_CHOICES,
    MAX_STOP_CHARS,
    MAX_STOPS,
    SAMPLING_DEFAULTS,
    ChatMessage,
    ChatPrompt,
    GenerationRequest,
    Prompt,
    Sampling,
    TextPrompt,
    TokenPrompt,
)

_T = TypeVar("_T")
_M = TypeVar("_M", bound=BaseModel)

MAX_TOKEN_ID = 2**31 - 1
MAX_LOGIT_BIASES = 1024
MAX_MESSAGES = 4096
MAX_FIELDS = 256  # of a body
MAX_BODY_VALUES = 100_000  # in all its lists and objects, the prompt left out
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's


class UnknownField(InvalidInput):
    """A field that no version of the API has."""

    code = "unknown_parameter"


class UnsupportedField(InvalidInput):
    """A field, or a value of one, that would change the result and isn't supported."""

    code = "unsupported_parameter"


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _as_token_biases(value: object) -> object:
    if not isinstance(value, dict):
        return value
    try:
        return {int(key): bias for key, bias in value.items()}
    except (ValueError, TypeError) as error:
        raise ValueError("keys must be token ids") from error


TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


_PROMPT_FORMS = "must be a string, a list of strings, a list of token ids or a list of such lists"


def _checked_prompt(value: object) -> object:
    """A prompt in any of its forms. Looked at by its first item: trying one form after the other costs seconds for a long list."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise InvalidInput(f"prompt: {_PROMPT_FORMS}", "prompt")
    first = value[0] if value else ""
    if isinstance(first, int) and not isinstance(first, bool):
        _check_token_ids(value, "prompt")
        return value
    if len(value) > MAX_CHOICES:
        raise InvalidInput(f"prompt: {len(value)} prompts are more than {MAX_CHOICES} choices", "prompt")
    for index, item in enumerate(value):
        if type(item) is not type(first) or not isinstance(item, str | list):
            raise InvalidInput(f"prompt: {_PROMPT_FORMS}", "prompt")
        if isinstance(item, list):
            _check_token_ids(item, f"prompt[{index}]")
    return value


def _check_token_ids(ids: list[object], field: str) -> None:
    if set(map(type, ids)) <= {int} and (not ids or (min(ids) >= 0 and max(ids) <= MAX_TOKEN_ID)):  # type: ignore[type-var, operator]
        return
    for index, item in enumerate(ids):
        if type(item) is not int or not 0 <= item <= MAX_TOKEN_ID:
            raise InvalidInput(f"prompt: {_PROMPT_FORMS}; {field}[{index}] is not a token id", "prompt")


class SamplingFields(BaseModel):
    """How tokens are chosen: the one place of the ranges, for both doors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    max_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKEN_ID)
    temperature: Finite | None = Field(default=None, ge=0, le=2)
    top_p: Finite | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=MAX_TOKEN_ID)
    min_p: Finite | None = Field(default=None, ge=0, le=1)
    presence_penalty: Finite | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: Finite | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: Finite | None = Field(default=None, gt=0, le=10)
    logit_bias: Annotated[dict[TokenId, Annotated[Finite, Field(ge=-100, le=100)]] | None, BeforeValidator(_as_token_biases)] = (
        Field(default=None, max_length=MAX_LOGIT_BIASES)
    )
    seed: int | None = Field(default=None, ge=-(2**63), le=2**64 - 1)
    stop_token_ids: list[TokenId] | None = Field(default=None, max_length=1024)
    min_tokens: int | None = Field(default=None, ge=0, le=MAX_TOKEN_ID)
    ignore_eos: bool | None = None

    def sampling(self, *, max_tokens: int | None, num_logprobs: int | None) -> Sampling:
        """The values, with defaults for what is absent.

        Raises:
            InvalidInput: min_tokens is above max_tokens.
        """
        min_tokens = _default(self.min_tokens, 0)
        if max_tokens is not None and min_tokens > max_tokens:
            raise InvalidInput(f"min_tokens is {min_tokens}, above max_tokens, {max_tokens}", "min_tokens")
        return Sampling(
            max_tokens=max_tokens,
            temperature=_default(self.temperature, 1.0),
            top_p=_default(self.top_p, 1.0),
            top_k=max(0, _default(self.top_k, 0)),
            min_p=_default(self.min_p, 0.0),
            presence_penalty=_default(self.presence_penalty, 0.0),
            frequency_penalty=_default(self.frequency_penalty, 0.0),
            repetition_penalty=_default(self.repetition_penalty, 1.0),
            logit_bias=_default(self.logit_bias, {}),
            seed=None if self.seed is None else self.seed % 2**64,
            stop_token_ids=frozenset(_default(self.stop_token_ids, [])),
            min_tokens=min_tokens,
            ignore_eos=_default(self.ignore_eos, False),
            num_logprobs=num_logprobs,
            unset=frozenset(name for name in SAMPLING_DEFAULTS if getattr(self, name) is None),
        )


class StreamOptions(BaseModel):
    """Options of streamed answers."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding against traffic analysis; not applied


class _Body(SamplingFields):
    """What both endpoints share."""

    unsupported: ClassVar[dict[str, tuple[object, ...]]] = {}  # field → values that change nothing, besides null

    model: str = Field(min_length=1, max_length=512)
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    stop: Annotated[list[Stop] | None, BeforeValidator(_as_list)] = Field(default=None, max_length=MAX_STOPS)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    priority: int | None = Field(default=None, ge=-(2**31), le=2**31 - 1)
    cache_salt: str | None = Field(default=None, max_length=256)
    # Without influence on the result.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        for name, harmless in cls.unsupported.items():
            given = value.get(name)
            if given is not None and not any(type(given) is type(item) and given == item for item in harmless):
                raise UnsupportedField(f"{name} is not supported", name)
        return {name: given for name, given in value.items() if name not in cls.unsupported}

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise InvalidInput("stream_options is only allowed with stream", "stream_options")
        return self


class ContentPart(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    type: Literal["text"]
    text: str


class MessageBody(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: list[ContentPart]
    name: str | None = Field(default=None, max_length=256)

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, value: object) -> object:
        """Clients send an assistant's message back as they got it, with fields that are null or empty."""
        if isinstance(value, dict) and value.get("role") == "assistant":
            empty = ("refusal", "audio", "function_call", "tool_calls", "annotations", "reasoning_content")
            return {name: given for name, given in value.items() if name not in empty or given not in (None, [], "")}
        return value

    @field_validator("content", mode="before")
    @classmethod
    def _as_parts(cls, value: object) -> object:
        return [{"type": "text", "text": value}] if isinstance(value, str) else value

    def message(self) -> ChatMessage:
        """The value; several parts are joined by line ends."""
        return ChatMessage(role=self.role, content="\n".join(part.text for part in self.content), name=self.name)


class ChatBody(_Body):
    """POST /v1/chat/completions."""

    unsupported = {
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "reasoning_effort": (),
        "verbosity": (),
        "web_search_options": (),
        "moderation": (),
    }

    messages: list[MessageBody] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKEN_ID)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[Annotated[str, Field(max_length=64)], str | int | float | bool | None] | None = Field(
        default=None, max_length=32
    )

    def request(self, *, request_id: str, deadline_s: float | None, traceparent: str | None) -> GenerationRequest:
        """The value. Raises InvalidInput where fields contradict each other."""
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidInput("top_logprobs needs logprobs: true", "top_logprobs")
        num_logprobs = _default(self.top_logprobs, 0) if self.logprobs else None
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        prompt = ChatPrompt(
            messages=tuple(message.message() for message in self.messages),
            add_generation_prompt=_default(self.add_generation_prompt, True),
            variables=_default(self.chat_template_kwargs, {}),
        )
        return _request(
            self,
            request_id=request_id,
            prompts=(prompt,),
            operation="chat",
            sampling=self.sampling(max_tokens=max_tokens, num_logprobs=num_logprobs),
            deadline_s=deadline_s,
            traceparent=traceparent,
            max_tokens_field="max_tokens" if self.max_completion_tokens is None else "max_completion_tokens",
        )


class CompletionBody(_Body):
    """POST /v1/completions."""

    unsupported = {
        "suffix": ("",),
    }

    prompt: Annotated[str | list[str] | list[int] | list[list[int]], PlainValidator(_checked_prompt)]
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = None
    best_of: int | None = Field(default=None, ge=1, le=MAX_CHOICES)

    def request(self, *, request_id: str, deadline_s: float | None, traceparent: str | None) -> GenerationRequest:
        """The value. Raises InvalidInput where fields contradict each other."""
        n = _default(self.n, 1)
        if self.best_of is not None and self.best_of != n:
            raise UnsupportedField("best_of other than n is not supported", "best_of")
        if self.echo and self.logprobs is not None:
            raise UnsupportedField("echo together with logprobs is not supported", "echo")
        prompts = self._prompts()
        if len(prompts) * n > MAX_CHOICES:
            raise InvalidInput(f"{len(prompts)} prompts with n = {n} make more than {MAX_CHOICES} choices", "prompt")
        max_tokens = _default(self.max_tokens, max(DEFAULT_COMPLETION_TOKENS, _default(self.min_tokens, 0)))
        return _request(
            self,
            request_id=request_id,
            prompts=prompts,
            operation="text_completion",
            sampling=self.sampling(max_tokens=max_tokens, num_logprobs=self.logprobs),
            deadline_s=deadline_s,
            traceparent=traceparent,
        )

    def _prompts(self) -> tuple[Prompt, ...]:
        if isinstance(self.prompt, str):
            return (TextPrompt(text=self.prompt),)
        if not self.prompt:
            raise InvalidInput("the prompt is empty", "prompt")
        first = self.prompt[0]
        if isinstance(first, int):
            return (TokenPrompt(token_ids=tuple(item for item in self.prompt if isinstance(item, int))),)
        return tuple(
            TextPrompt(text=item, field=f"prompt[{index}]")
            if isinstance(item, str)
            else TokenPrompt(token_ids=tuple(item) if isinstance(item, list) else (), field=f"prompt[{index}]")
            for index, item in enumerate(self.prompt)
        )


def _request(
    body: _Body,
    *,
    request_id: str,
    prompts: tuple[Prompt, ...],
    operation: Literal["chat", "text_completion"],
    sampling: Sampling,
    deadline_s: float | None,
    traceparent: str | None,
    max_tokens_field: str = "max_tokens",
) -> GenerationRequest:
    return GenerationRequest(
        request_id=request_id,
        model=body.model,
        prompts=prompts,
        sampling=sampling,
        operation=operation,
        n=_default(body.n, 1),
        stop=tuple(_default(body.stop, [])),
        include_stop=_default(body.include_stop_str_in_output, False),
        skip_special_tokens=_default(body.skip_special_tokens, True),
        stream=_default(body.stream, False),
        deadline_s=deadline_s,
        priority=_default(body.priority, 0),
        cache_salt=_default(body.cache_salt, ""),
        traceparent=traceparent,
        max_tokens_field=max_tokens_field,
    )


def _default(value: _T | None, default: _T) -> _T:
    return default if value is None else value


def parse(kind: type[_M], value: object, *, prefix: str = "") -> _M:
    """Validate ``value``; ``prefix`` goes before the fields' names in errors.

    Raises:
        InvalidInput: the first wrong field, named; UnknownField for one that doesn't exist.
    """
    _check_sizes(value, prefix)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _translate(error, prefix) from error


def _check_sizes(value: object, prefix: str) -> None:
    """Refuse bodies with more values than any request has: validation describes each wrong one before the first can be told."""
    if not isinstance(value, dict):
        return
    if len(value) > MAX_FIELDS:
        raise InvalidInput(f"the body has {len(value)} fields, more than {MAX_FIELDS}")
    num_values = 0
    open_values = [item for name, item in value.items() if name != "prompt"]  # it is checked by hand
    while open_values:
        item = open_values.pop()
        if isinstance(item, dict | list):
            num_values += len(item)
            if num_values > MAX_BODY_VALUES:
                raise InvalidInput(f"{prefix}the body holds more than {MAX_BODY_VALUES} values besides its prompt")
            open_values += item.values() if isinstance(item, dict) else item


def _translate(error: ValidationError, prefix: str) -> InvalidInput:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["type"] == "extra_forbidden":
        field = prefix + _path(first["loc"])
        return UnknownField(f"unknown parameter: {field[:200]}", field)
    field = prefix + _path(first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return InvalidInput(f"missing required parameter: {field}", field)
    return InvalidInput(f"{field}: {message[:1].lower()}{message[1:]}" if field else message, field or None)


def _path(location: tuple[int | str, ...]) -> str:
    """pydantic's location as clients write it: messages[0].content. Branches of unions are left out."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part in _BRANCHES or "[" in part:
            continue
        else:
            path += f".{part}" if path else part
    return path


_BRANCHES = frozenset({"str", "int", "float", "bool"})  # pydantic's names for a union's branches
