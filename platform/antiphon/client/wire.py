"""Messages of antiphon.rpc.v1 to and from the SDK's values (request speed).

Must not know: connections, or when a call is tried again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from antiphon.client.status_values import (
    CompositionStatus,
    ExpertStanding,
    GatewayStatus,
    PoolStatus,
    ServiceStatus,
    WorkerStatus,
)
from antiphon.client.values import Chunk, Logprob, Message, ModelInfo, TokenProbability, Usage
from antiphon.core.errors import InvalidInput
from antiphon.core.request import FinishReason
from antiphon.rpc.load import decode_load
from antiphon.rpc.v1 import inference_pb2 as pb

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
    n: int  # [1] independent choices
    stop: str | Sequence[str]  # generation ends before the first that appears
    include_stop: bool  # [False] keep the stop at the end of the text
    num_logprobs: int  # [none] 0 = the chosen token's only
    request_id: str  # [chosen by the server]
    priority: int  # [0] smaller runs earlier
    cache_salt: str  # separates prefix caches, e.g. by tenant
    timeout_s: float  # [the client's] for the whole call with its retries
    traceparent: str  # W3C trace context, to make the server's spans part of a trace


_SAMPLING = (
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "seed", "min_tokens", "ignore_eos",
)  # fmt: skip
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


def _set_messages(request: pb.GenerateRequest, messages: Sequence[Message | Mapping[str, str]]) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise InvalidInput("messages: expected a sequence of messages", "messages")
    request.chat.SetInParent()
    for i, message in enumerate(messages):
        if isinstance(message, Message):
            parts: Mapping[str, str] = {"role": message.role, "content": message.content, "name": message.name}
        elif isinstance(message, Mapping):
            parts = message
        else:
            raise InvalidInput(f"messages[{i}]: expected a Message or a mapping", f"messages[{i}]")
        unknown = parts.keys() - {"role", "content", "name"}
        if unknown:
            raise InvalidInput(f"messages[{i}]: unknown keys: {', '.join(sorted(unknown))}", f"messages[{i}]")
        added = request.chat.messages.add()
        for key, value in parts.items():
            _set(added, key, value, f"messages[{i}].{key}")


def chunk_of(delta: pb.Delta) -> Chunk:
    """The chunk that a Delta brings."""
    stopped_by = delta.WhichOneof("stopped_by")
    return Chunk(
        index=delta.index,
        text=delta.text,
        token_ids=tuple(delta.token_ids),
        logprobs=tuple(
            Logprob(chosen=_probability(part.chosen), rank=part.rank, top=tuple(map(_probability, part.top)))
            for part in delta.logprobs
        ),
        finish_reason=_FINISH.get(delta.finish_reason),
        stop_string=delta.stop_string if stopped_by == "stop_string" else None,
        stop_token_id=delta.stop_token_id if stopped_by == "stop_token_id" else None,
    )


def _probability(part: pb.TokenProbability) -> TokenProbability:
    return TokenProbability(token_id=part.token_id, token=part.token, token_bytes=part.token_bytes, logprob=part.logprob)


def usage_of(usage: pb.Usage) -> Usage:
    """Usage as values."""
    return Usage(
        num_prompt_tokens=usage.num_prompt_tokens,
        num_completion_tokens=usage.num_completion_tokens,
        num_cached_tokens=usage.num_cached_tokens,
        num_remote_tokens=usage.num_remote_tokens,
        num_resumptions=usage.num_resumptions,
        first_token_s=usage.first_token_s,
        finished_s=usage.finished_s,
    )


def models_of(response: pb.ListModelsResponse) -> tuple[ModelInfo, ...]:
    """The models as values."""
    return tuple(
        ModelInfo(id=card.id, max_model_len=card.max_model_len, created=card.created, ready=card.ready, revision=card.revision)
        for card in response.models
    )


def status_of(response: pb.GetStatusResponse) -> ServiceStatus:
    """The status as values."""
    gateway = response.gateway
    return ServiceStatus(
        gateway=GatewayStatus(
            version=gateway.version,
            uptime_s=gateway.uptime_s,
            num_requests=gateway.num_requests,
            draining=gateway.draining,
        ),
        pools=tuple(
            PoolStatus(
                deployment=pool.deployment,
                name=pool.name,
                role=pool.role,
                num_workers=pool.num_workers,
                num_ready=pool.num_ready,
                num_waiting=pool.num_waiting,
                num_running=pool.num_running,
                kv_usage=pool.kv_usage,
            )
            for pool in response.pools
        ),
        workers=tuple(_worker(worker) for worker in response.workers),
        compositions=tuple(_composition(composition) for composition in response.compositions),
    )


def _composition(composition: pb.CompositionStatus) -> CompositionStatus:
    return CompositionStatus(
        name=composition.name,
        state=composition.state,
        message=composition.message,
        experts=tuple(
            ExpertStanding(
                name=expert.name,
                external=expert.external,
                general=expert.general,
                healthy=expert.healthy,
                resident=expert.resident,
                num_waiting=expert.num_waiting,
                expected_wait_s=expert.expected_wait_s,
            )
            for expert in composition.experts
        ),
        num_fallbacks=composition.num_fallbacks,
        last_fallback=composition.last_fallback,
    )


def _worker(worker: pb.WorkerStatus) -> WorkerStatus:
    return WorkerStatus(
        worker_id=worker.worker_id,
        deployment=worker.deployment,
        pool=worker.pool,
        role=worker.role,
        model=worker.model,
        revision=worker.revision,
        fingerprint=worker.fingerprint,
        epoch=worker.epoch,
        rpc_address=worker.rpc_address,
        data_address=worker.data_address,
        pid=worker.pid,
        host=worker.host,
        shard=worker.shard,
        ready=worker.ready,
        draining=worker.draining,
        message=worker.message,
        lease_remaining_s=worker.lease_remaining_s if worker.HasField("lease_remaining_s") else None,
        connected=worker.connected if worker.HasField("connected") else None,
        num_requests=worker.num_requests,
        load=decode_load(worker.load),
    )
