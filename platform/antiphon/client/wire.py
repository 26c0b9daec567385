"""Messages of antiphon.rpc.v1 to and from the SDK's values (request speed).

Must not know: connections, or when a call is tried again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

from antiphon.client.status_values import (
    CompositionStatus,
    ExpertStanding,
    GatewayStatus,
    PoolStatus,
    ServiceStatus,
    WorkerStatus,
)
from antiphon.client.values import CallPiece, Chunk, Logprob, Message, ModelInfo, TokenProbability, Tool, Usage
from antiphon.core.errors import InvalidInput
from antiphon.core.request import FinishReason
from antiphon.rpc.messages.by_name import scalar_names, value_from
from antiphon.rpc.messages.load import decode_load
from antiphon.rpc.v1 import inference_pb2 as pb

_CALL_KINDS = frozenset(("call_begin", "call_arguments", "call_end"))
_FINISH: Mapping[int, FinishReason] = {
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}


class GenerateOptions(TypedDict, total=False):
    """What may be asked of a model. Exactly one of ``prompt``, ``messages`` and ``token_ids`` is needed.

    What is left out takes the server's default, in brackets.
    """

    prompt: str  # tokenized with the model's special tokens
    messages: Sequence[Message | Mapping[str, str]]  # rendered with the model's chat template
    token_ids: Sequence[int]
    max_tokens: int  # [what fits into the model's context]
    temperature: float  # [1] 0 = greedy
    top_p: float  # [1]
    top_k: int  # [0] 0 = off
    min_p: float  # [0]
    presence_penalty: float  # [0]
    frequency_penalty: float  # [0]
    repetition_penalty: float  # [1]
    logit_bias: Mapping[int, float]  # by token id
    seed: int  # [drawn] equal seeds give equal tokens
    stop_token_ids: Sequence[int]
    min_tokens: int  # [0] no stop before this many
    ignore_eos: bool  # [False]
    speculation: str  # [auto] off = without drafts, where the deployment has them; the tokens are the same
    n: int  # [1] independent choices
    stop: str | Sequence[str]  # generation ends before the first that appears
    include_stop: bool  # [False] keep the stop at the end of the text
    num_logprobs: int  # [none] 0 = the chosen token's only
    request_id: str  # [chosen by the server]
    priority: int  # [0] smaller runs earlier
    cache_salt: str  # separates prefix caches, e.g. by tenant
    timeout_s: float  # [the client's] for the whole call with its retries
    tools: Sequence[Tool]  # that an answer to messages may call
    tool_choice: str  # [auto where there are tools] none, auto, required, or the name of the one to call once
    parallel_tool_calls: bool  # [True] more than one call in an answer
    json_schema: Mapping[str, Any]  # what the answer must be; at most one of these five
    json_object: bool
    regex: str
    choices: Sequence[str]
    grammar: str  # llguidance's Lark
    thinking: bool  # [the model's way] whether it thinks
    reasoning_effort: str  # [the model's way] none, minimal, low, medium, high
    thinking_budget: int  # [no bound] tokens of thought
    traceparent: str  # W3C trace context, to make the server's spans part of a trace


_SAMPLING = scalar_names(pb.Sampling)
_REQUEST = ("include_stop", "num_logprobs", "request_id", "priority", "cache_salt")


def generate_request(model: str, options: GenerateOptions) -> pb.GenerateRequest:
    """The message that asks for it.

    Raises:
        InvalidInput: an option is unknown, has a type or size no message can carry, or the input is not exactly one.
    """
    unknown = options.keys() - GenerateOptions.__annotations__.keys()
    if unknown:
        raise InvalidInput(f"unknown options: {', '.join(sorted(unknown))}", min(unknown))
    request = pb.GenerateRequest()
    _set(request, "model", model)
    given = [name for name in ("prompt", "messages", "token_ids") if name in options]
    if len(given) != 1:
        raise InvalidInput(f"exactly one of prompt, messages and token_ids is needed, got {', '.join(given) or 'none'}", "prompt")
    if "prompt" in options:
        _set(request, "prompt", options["prompt"])
    if "token_ids" in options:
        _extend(request.tokens.ids, "token_ids", options["token_ids"])
        request.tokens.SetInParent()
    if "messages" in options:
        _set_messages(request, options["messages"])
    values: Mapping[str, Any] = options
    for name in _SAMPLING:
        if name in values:
            _set(request.sampling, name, values[name])
    for name in _REQUEST:
        if name in values:
            _set(request, name, values[name])
    if "n" in options:
        _set(request, "num_choices", options["n"], shown="n")
    if "stop" in options:
        stop = options["stop"]
        _extend(request.stop, "stop", [stop] if isinstance(stop, str) else stop)
    if "stop_token_ids" in options:
        _extend(request.sampling.stop_token_ids, "stop_token_ids", options["stop_token_ids"])
    if "logit_bias" in options:
        try:
            request.sampling.logit_bias.update(options["logit_bias"])
        except (TypeError, ValueError, AttributeError) as error:
            raise InvalidInput(f"logit_bias: {error}", "logit_bias") from error
    set_agents(request, options)
    return request


def _set(message: Any, name: str, value: object, shown: str | None = None) -> None:
    field = shown or name
    try:
        setattr(message, name, value)
    except (TypeError, ValueError) as error:  # UnicodeEncodeError is a ValueError
        raise InvalidInput(f"{field}: {error}", field) from error


def _extend(repeated: Any, field: str, values: object) -> None:
    if isinstance(values, str | bytes):
        raise InvalidInput(f"{field}: expected a sequence, got text", field)
    try:
        repeated.extend(values)
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"{field}: {error}", field) from error


def set_agents(request: pb.GenerateRequest, options: GenerateOptions) -> None:
    """Tools, shape and thinking. Raises InvalidInput."""
    tools: Any = options.get("tools", ())
    if not isinstance(tools, Iterable):
        raise InvalidInput("tools: expected a sequence of Tool", "tools")
    for i, tool in enumerate(tools):
        if not isinstance(tool, Tool):
            raise InvalidInput(f"tools[{i}]: expected a Tool", f"tools[{i}]")
        added = request.tools.add()
        for name in ("name", "description", "strict"):
            _set(added, name, getattr(tool, name), f"tools[{i}].{name}")
        if tool.parameters:
            added.parameters = _json_text(tool.parameters, f"tools[{i}].parameters")
    if "tool_choice" in options:
        is_name = options["tool_choice"] not in ("none", "auto", "required")
        _set(request, "tool_name" if is_name else "tool_choice", options["tool_choice"], "tool_choice")
    if "parallel_tool_calls" in options:
        _set(request, "parallel_tool_calls", options["parallel_tool_calls"])
    shapes = [name for name in ("json_schema", "json_object", "regex", "choices", "grammar") if name in options]
    if len(shapes) > 1:
        raise InvalidInput(f"the answer has one shape, got {' and '.join(shapes)}", shapes[1])
    if "json_schema" in options:
        request.shape.json_schema = _json_text(options["json_schema"], "json_schema")
    if "choices" in options:
        _extend(request.shape.choices.texts, "choices", options["choices"])
    values: Mapping[str, Any] = options
    for name in ("json_object", "regex", "grammar"):
        if name in values:
            _set(request.shape, name, values[name])
    for name, field in (("thinking", "enabled"), ("reasoning_effort", "effort"), ("thinking_budget", "budget_tokens")):
        if name in values:
            _set(request.reasoning, field, values[name], name)


def _json_text(value: object, field: str) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInput(f"{field}: {error}", field) from error


def _set_messages(request: pb.GenerateRequest, messages: Sequence[Message | Mapping[str, str]]) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise InvalidInput("messages: expected a sequence of messages", "messages")
    request.chat.SetInParent()
    for i, message in enumerate(messages):
        if isinstance(message, Message):
            names = ("role", "content", "name", "tool_call_id", "reasoning")
            parts: Mapping[str, str] = {name: getattr(message, name) for name in names}
        elif isinstance(message, Mapping):
            parts = message
        else:
            raise InvalidInput(f"messages[{i}]: expected a Message or a mapping", f"messages[{i}]")
        unknown = parts.keys() - {"role", "content", "name", "tool_call_id", "reasoning"}
        if unknown:
            raise InvalidInput(f"messages[{i}]: unknown keys: {', '.join(sorted(unknown))}", f"messages[{i}]")
        added = request.chat.messages.add()
        for key, value in parts.items():
            _set(added, key, value, f"messages[{i}].{key}")
        for j, call in enumerate(message.tool_calls if isinstance(message, Message) else ()):
            made = added.tool_calls.add()
            for key in ("id", "name", "arguments"):
                _set(made, key, getattr(call, key), f"messages[{i}].tool_calls[{j}].{key}")


def chunk_of(delta: pb.Delta) -> Chunk:
    """The chunk that a Delta brings."""
    stopped_by = delta.WhichOneof("stopped_by")
    return Chunk(
        index=delta.index,
        text="".join(part.text for part in delta.parts) if delta.is_read else delta.text,
        thought="".join(part.thought for part in delta.parts),
        calls=tuple(_call_piece(part) for part in delta.parts if part.WhichOneof("kind") in _CALL_KINDS),
        token_ids=tuple(delta.token_ids),
        logprobs=tuple(
            Logprob(chosen=_probability(part.chosen), rank=part.rank, top=tuple(map(_probability, part.top)))
            for part in delta.logprobs
        ),
        finish_reason=_FINISH.get(delta.finish_reason),
        stop_string=delta.stop_string if stopped_by == "stop_string" else None,
        stop_token_id=delta.stop_token_id if stopped_by == "stop_token_id" else None,
    )


def _call_piece(part: pb.Part) -> CallPiece:
    match part.WhichOneof("kind"):
        case "call_begin":
            return CallPiece(index=part.call_begin.index, name=part.call_begin.name)
        case "call_arguments":
            return CallPiece(index=part.call_arguments.index, arguments=part.call_arguments.text)
        case _:
            return CallPiece(index=part.call_end, is_whole=True)


def _probability(part: pb.TokenProbability) -> TokenProbability:
    return value_from(TokenProbability, part)


def usage_of(usage: pb.Usage) -> Usage:
    """Usage as values."""
    return value_from(Usage, usage)


def models_of(response: pb.ListModelsResponse) -> tuple[ModelInfo, ...]:
    """The models as values."""
    return tuple(value_from(ModelInfo, card) for card in response.models)


def status_of(response: pb.GetStatusResponse) -> ServiceStatus:
    """The status as values."""
    return ServiceStatus(
        gateway=value_from(GatewayStatus, response.gateway),
        pools=tuple(value_from(PoolStatus, pool) for pool in response.pools),
        workers=tuple(value_from(WorkerStatus, worker, load=decode_load(worker.load)) for worker in response.workers),
        compositions=tuple(
            value_from(CompositionStatus, found, experts=tuple(value_from(ExpertStanding, expert) for expert in found.experts))
            for found in response.compositions
        ),
    )
