"""Bodies of OpenAI's requests, strictly typed, to GenerationRequest (request speed).

A field that would change the result and isn't supported is refused by name; fields without influence on the result (user, metadata,
store, verbosity, ...) are taken and ignored; null stands for absent. Beyond OpenAI's there are vLLM's extensions top_k, min_p,
repetition_penalty, ignore_eos, min_tokens, stop_token_ids, include_stop_str_in_output, skip_special_tokens, add_generation_prompt,
continue_final_message, chat_template_kwargs, structured_outputs, priority and cache_salt; and our own speculation.

Must not know: HTTP, tokenizers or workers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator

from antiphon.core.errors import InvalidInput
from antiphon.core.request import MAX_LOGPROBS
from antiphon.gateway.generation.request import (
    MAX_CHOICES,
    MAX_STOPS,
    ChatPrompt,
    GenerationRequest,
    Prompt,
    Sampling,
    TextPrompt,
    TokenPrompt,
)
from antiphon.gateway.generation.sampling_fields import MAX_TOKEN_ID, SamplingFields, Stop, value_or
from antiphon.gateway.openai.bodies.shapes import StructureFields
from antiphon.gateway.openai.bodies.tools import (
    MAX_TOOLS,
    ChoiceBody,
    FunctionBody,
    NamedFunction,
    ToolBody,
    allows_parallel,
    choice_of,
    function_choice_of,
    functions_of,
    tools_of,
)
from antiphon.gateway.openai.messages import MessageBody
from antiphon.gateway.openai.parsing import UnsupportedField, refuse_unsupported
from antiphon.gateway.text.chat_options import ChatOptions, Tool, ToolChoice

MAX_MESSAGES = 4096
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


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


class StreamOptions(BaseModel):
    """Options of streamed answers."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding against traffic analysis; not applied


TemplateVariables = Annotated[dict[Annotated[str, Field(max_length=64)], str | int | float | bool | None], Field(max_length=32)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class ReasoningBody(BaseModel):
    """``reasoning`` as other providers write it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    effort: Effort | None = None
    enabled: bool | None = None
    max_tokens: int | None = Field(default=None, ge=0, le=MAX_TOKEN_ID)
    exclude: bool | None = None
    summary: str | None = None
    generate_summary: str | None = None


# What other servers take that would change the answer, and the values that change nothing.
_BIND_ANSWERS: Mapping[str, tuple[object, ...]] = {
    "allowed_token_ids": (),
    "bad_words": ([],),
    "ebnf": (),
    "grammar": (),
    "json_schema": (),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "regex": (),
    "structural_tag": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}


class _Body(SamplingFields, StructureFields):
    """What both endpoints share."""

    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = _BIND_ANSWERS

    model: str = Field(min_length=1, max_length=512)
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    stop: Annotated[list[Stop] | None, BeforeValidator(_as_list)] = Field(default=None, max_length=MAX_STOPS)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
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
        return refuse_unsupported(value, cls.unsupported)

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise InvalidInput("stream_options is only allowed with stream", "stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidInput("prompt_logprobs come with whole answers only, not with stream", "prompt_logprobs")
        return self


class ChatBody(_Body):
    """POST /v1/chat/completions."""

    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **_BIND_ANSWERS,
        "best_of": (1,),
        "chat_template": (),
        "documents": ([],),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "web_search_options": (),
        "moderation": (),
    }

    messages: list[MessageBody] = Field(min_length=1, max_length=MAX_MESSAGES)
    tools: list[ToolBody] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: ChoiceBody | None = None
    parallel_tool_calls: bool | None = None
    functions: list[FunctionBody] | None = Field(default=None, max_length=MAX_TOOLS)
    function_call: Literal["none", "auto"] | NamedFunction | None = None
    reasoning_effort: Effort | None = None
    reasoning: ReasoningBody | None = None
    thinking_budget: int | None = Field(default=None, ge=0, le=MAX_TOKEN_ID)
    enable_thinking: bool | None = None
    include_reasoning: bool | None = None
    continue_final_message: bool | None = None
    verbosity: str | None = None  # a wish that no model here reads
    request_id: str | None = None  # the header decides
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKEN_ID)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    add_generation_prompt: bool | None = None
    chat_template_kwargs: TemplateVariables | None = None

    def request(self, *, request_id: str, deadline_s: float | None, traceparent: str | None) -> GenerationRequest:
        """The value. Raises InvalidInput where fields contradict each other."""
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidInput("top_logprobs needs logprobs: true", "top_logprobs")
        num_logprobs = value_or(self.top_logprobs, 0) if self.logprobs else None
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        prompt = ChatPrompt(
            messages=tuple(message.message() for message in self.messages),
            add_generation_prompt=value_or(self.add_generation_prompt, not self.continue_final_message),
            continue_final_message=continues(self.messages, self.continue_final_message, self.add_generation_prompt),
            variables=value_or(self.chat_template_kwargs, {}),
        )
        return _request(
            self,
            request_id=request_id,
            prompts=(prompt,),
            operation="chat",
            sampling=self.sampling(max_tokens=max_tokens, num_logprobs=num_logprobs, num_prompt_logprobs=self.prompt_logprobs),
            deadline_s=deadline_s,
            traceparent=traceparent,
            max_tokens_field="max_tokens" if self.max_completion_tokens is None else "max_completion_tokens",
            options=self.options(),
        )

    def options(self) -> ChatOptions:
        """Tools, shape and thinking.

        Raises:
            InvalidInput: they contradict each other.
        """
        if self.uses_functions:
            tools, (tool_choice, tool_names) = self._functions()
        else:
            tools = tools_of(value_or(self.tools, []))
            tool_choice, tool_names = choice_of(self.tool_choice, tools)
        reasoning = ReasoningBody() if self.reasoning is None else self.reasoning
        effort = reasoning.effort if self.reasoning_effort is None else self.reasoning_effort
        thinking = reasoning.enabled if self.enable_thinking is None else self.enable_thinking
        if thinking is None and effort is not None:
            thinking = effort != "none"
        own = self.thinking_budget is not None
        return ChatOptions(
            tools=tools,
            tool_choice=tool_choice,
            tool_names=tool_names,
            tool_choice_field="function_call" if self.uses_functions else "tool_choice",
            parallel_tool_calls=allows_parallel(
                self.tool_choice, asked=value_or(self.parallel_tool_calls, not self.uses_functions)
            ),
            shape=self.shape(),
            thinking=thinking,
            effort=None if effort == "none" else effort,
            thinking_budget=self.thinking_budget if own else reasoning.max_tokens,
            thinking_field="thinking_budget" if own else "reasoning.max_tokens",
            effort_field=self._thinking_asked_by(),
        )

    def _thinking_asked_by(self) -> str:
        if self.enable_thinking is not None:
            return "enable_thinking"
        if self.reasoning_effort is not None or self.reasoning is None:
            return "reasoning_effort"
        return "reasoning.effort" if self.reasoning.enabled is None else "reasoning.enabled"

    @property
    def uses_functions(self) -> bool:
        """Whether tools were asked for by their older name, so that an answer has one ``function_call`` at most."""
        return bool(self.functions) or isinstance(self.function_call, NamedFunction)

    def _functions(self) -> tuple[tuple[Tool, ...], tuple[ToolChoice, tuple[str, ...] | None]]:
        if self.tools or self.tool_choice is not None:
            raise InvalidInput("functions: tools are the newer name of it; both together mean nothing", "functions")
        if self.parallel_tool_calls:
            raise InvalidInput("parallel_tool_calls: functions are called one at a time", "parallel_tool_calls")
        tools = functions_of(value_or(self.functions, []))
        return tools, function_choice_of(self.function_call, tools)

    @property
    def shows_thoughts(self) -> bool:
        """Whether the answer shows what the model thought."""
        return self.include_reasoning is not False and not (self.reasoning is not None and self.reasoning.exclude)


def continues(messages: Sequence[MessageBody], asked: bool | None, add_generation_prompt: bool | None) -> bool:
    """Whether a chat's last message is the beginning of the answer. Raises InvalidInput where that can't be."""
    if not asked:
        return False
    if add_generation_prompt:
        raise InvalidInput("continue_final_message and add_generation_prompt exclude each other", "continue_final_message")
    if messages[-1].role != "assistant":
        raise InvalidInput("continue_final_message needs a last message of the assistant", "continue_final_message")
    return True


class CompletionBody(_Body):
    """POST /v1/completions."""

    prompt: Annotated[str | list[str] | list[int] | list[list[int]], PlainValidator(_checked_prompt)]
    max_tokens: int | None = Field(default=None, ge=0, le=MAX_TOKEN_ID)
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = None
    best_of: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    suffix: str | None = None

    def request(self, *, request_id: str, deadline_s: float | None, traceparent: str | None) -> GenerationRequest:
        """The value. Raises InvalidInput where fields contradict each other."""
        n = value_or(self.n, 1)
        if self.best_of is not None and self.best_of != n:
            raise UnsupportedField("best_of other than n is not supported", "best_of")
        if self.max_tokens == 0 and not (self.echo or self.prompt_logprobs is not None):
            raise InvalidInput("max_tokens: 0 needs echo or prompt_logprobs, or the answer is empty", "max_tokens")
        if self.suffix and self.echo:
            raise InvalidInput("suffix: what is filled in has texts on both sides: echo is not possible", "suffix")
        prompts = self._prompts()
        if len(prompts) * n > MAX_CHOICES:
            raise InvalidInput(f"{len(prompts)} prompts with n = {n} make more than {MAX_CHOICES} choices", "prompt")
        max_tokens = value_or(self.max_tokens, max(DEFAULT_COMPLETION_TOKENS, value_or(self.min_tokens, 0)))
        return _request(
            self,
            request_id=request_id,
            prompts=prompts,
            operation="text_completion",
            sampling=self.sampling(
                max_tokens=max_tokens,
                num_logprobs=self.logprobs,
                num_prompt_logprobs=self._num_prompt_logprobs(),
            ),
            deadline_s=deadline_s,
            traceparent=traceparent,
            options=ChatOptions(shape=self.shape()),
        )

    def _num_prompt_logprobs(self) -> int | None:
        """The most that is shown of any token of the prompt: in the echo, or by itself."""
        shown = [each for each in (self.logprobs if self.echo else None, self.prompt_logprobs) if each is not None]
        return max(shown, default=None)

    def _prompts(self) -> tuple[Prompt, ...]:
        if isinstance(self.prompt, str):
            return (TextPrompt(text=self.prompt, suffix=self.suffix or None),)
        if not self.prompt:
            raise InvalidInput("the prompt is empty", "prompt")
        first = self.prompt[0]
        if self.suffix and not isinstance(first, str):
            raise InvalidInput("suffix: it needs a prompt of text", "suffix")
        if isinstance(first, int):
            return (TokenPrompt(token_ids=tuple(item for item in self.prompt if isinstance(item, int))),)
        return tuple(
            TextPrompt(text=item, suffix=self.suffix or None, field=f"prompt[{index}]")
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
    options: ChatOptions,
) -> GenerationRequest:
    return GenerationRequest(
        request_id=request_id,
        model=body.model,
        prompts=prompts,
        sampling=sampling,
        operation=operation,
        n=value_or(body.n, 1),
        stop=tuple(value_or(body.stop, [])),
        include_stop=value_or(body.include_stop_str_in_output, False),
        skip_special_tokens=value_or(body.skip_special_tokens, True),
        stream=value_or(body.stream, False),
        deadline_s=deadline_s,
        priority=value_or(body.priority, 0),
        cache_salt=value_or(body.cache_salt, ""),
        traceparent=traceparent,
        max_tokens_field=max_tokens_field,
        options=options,
    )
