"""The public gRPC door: inference.proto's messages to the gateway's values and back (request speed).

Must not know: how requests are answered.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from antiphon.core.document.composition import split_model_name
from antiphon.core.errors import AntiphonError, InvalidInput
from antiphon.core.ids import FFNShard, Role
from antiphon.core.request import MAX_LOGPROBS, FinishReason
from antiphon.gateway.compositions import CompositionGenerator, CompositionStatus, ServedComposition
from antiphon.gateway.gateway import Gateway
from antiphon.gateway.generation.request import (
    MAX_CHOICES,
    MAX_STOP_CHARS,
    MAX_STOPS,
    ChatPrompt,
    ChoiceDelta,
    Completed,
    Event,
    GenerationRequest,
    Logprob,
    Prompt,
    Started,
    TextPrompt,
    TokenProbability,
    TokenPrompt,
)
from antiphon.gateway.generation.sampling_fields import SamplingFields
from antiphon.gateway.grpc import agents, vectors
from antiphon.gateway.openai.http_io import new_request_id, valid_request_id
from antiphon.gateway.openai.parsing import parse
from antiphon.gateway.status import WorkerStatus
from antiphon.rpc.inference import CallInfo
from antiphon.rpc.messages.by_name import message_from, scalars_of
from antiphon.rpc.messages.load import encode_load
from antiphon.rpc.v1 import inference_pb2 as pb

_FINISH = {FinishReason.STOP: pb.FINISH_REASON_STOP, FinishReason.LENGTH: pb.FINISH_REASON_LENGTH}


class GrpcDoor:
    """antiphon.rpc.inference.InferencePort over a gateway."""

    def __init__(self, gateway: Gateway, compositions: CompositionGenerator | None = None) -> None:
        self._gateway = gateway
        self._compositions = compositions

    async def generate(self, request: pb.GenerateRequest, call: CallInfo) -> AsyncGenerator[pb.GenerateResponse, None]:
        """See the proto."""
        try:
            tenant = self._gateway.admit(call.metadata.get("authorization"))
            if not request.resume:
                self._gateway.check_room(tenant)
            generation = self._gateway.for_tenant(generation_request(request, call), tenant)
        except AntiphonError as error:
            self._gateway.refused(error, request.model)
            raise
        if self._compositions is None or split_model_name(generation.model) is None:
            answering = self._gateway.generate(generation)
        else:
            answering = self._compositions.generate(generation, call.metadata, call.announce)
        async with aclosing(answering) as events:
            async for event in events:
                yield response_of(event)

    async def list_models(self, request: pb.ListModelsRequest, call: CallInfo) -> pb.ListModelsResponse:
        """See the proto."""
        gateway = self._gateway
        self._check(call)
        return pb.ListModelsResponse(
            models=[
                pb.ModelCard(
                    id=name,
                    max_model_len=gateway.max_model_len(name) or 0,
                    created=gateway.created,
                    ready=gateway.is_ready(name),
                    revision=gateway.revision(name),
                    task=gateway.task(name),
                )
                for name in gateway.models
            ]
            + [_composition_card(composition, gateway.created) for composition in gateway.compositions.values()]
        )

    async def embed(self, request: pb.EmbedRequest, call: CallInfo) -> pb.EmbedResponse:
        """See the proto."""
        return await vectors.embed(self._gateway, request, call)

    async def score(self, request: pb.ScoreRequest, call: CallInfo) -> pb.ScoreResponse:
        """See the proto."""
        return await vectors.score(self._gateway, request, call)

    async def get_status(self, request: pb.GetStatusRequest, call: CallInfo) -> pb.GetStatusResponse:
        """See the proto."""
        self._check(call, admin=True)
        status = self._gateway.status(request.deployment)
        return pb.GetStatusResponse(
            gateway=message_from(pb.GatewayStatus, status),
            pools=[message_from(pb.PoolStatus, pool) for pool in status.pools],
            workers=[_worker(worker) for worker in status.workers],
            compositions=[_composition(composition) for composition in status.compositions],
        )

    def _check(self, call: CallInfo, *, admin: bool = False) -> None:
        try:
            self._gateway.keys.check(call.metadata.get("authorization"), admin=admin)
        except AntiphonError as error:
            self._gateway.refused(error)
            raise


def generation_request(request: pb.GenerateRequest, call: CallInfo) -> GenerationRequest:
    """The value of a message.

    Raises:
        InvalidInput: a field is wrong; its path is named.
    """
    if not request.model:
        raise InvalidInput("model is missing", "model")
    if request.num_choices > MAX_CHOICES:
        raise InvalidInput(f"at most {MAX_CHOICES} choices", "num_choices")
    n = max(1, request.num_choices)
    num_logprobs = request.num_logprobs if request.HasField("num_logprobs") else None
    if num_logprobs is not None and num_logprobs > MAX_LOGPROBS:
        raise InvalidInput(f"at most {MAX_LOGPROBS} alternatives", "num_logprobs")
    if request.request_id and not valid_request_id(request.request_id):
        raise InvalidInput("a request id has at most 128 characters of A-Z a-z 0-9 . _ : -", "request_id")
    fields = parse(SamplingFields, _sampling_fields(request.sampling), prefix="sampling.")
    try:
        sampling = fields.sampling(max_tokens=fields.max_tokens, num_logprobs=num_logprobs)
    except InvalidInput as error:
        raise InvalidInput(str(error), f"sampling.{error.field}") from error
    left_s = call.deadline_left_s
    return GenerationRequest(
        request_id=request.request_id or new_request_id(),
        model=request.model,
        prompts=(_prompt(request),),
        sampling=sampling,
        operation="chat" if request.HasField("chat") else "text_completion",
        n=n,
        stop=_stops(request.stop),
        include_stop=request.include_stop,
        stream=True,
        deadline_s=left_s if left_s is not None and math.isfinite(left_s) else None,
        priority=request.priority,
        cache_salt=request.cache_salt,
        traceparent=call.metadata.get("traceparent"),
        resume=_resume(request, n),
        options=agents.options_of(request),
        max_tokens_field="sampling.max_tokens",
        sampling_prefix="sampling.",
    )


def response_of(event: Event) -> pb.GenerateResponse:
    """The message of an event."""
    match event:
        case Started():
            return pb.GenerateResponse(
                started=pb.Started(
                    request_id=event.request_id,
                    model=event.model,
                    seed=event.seed,
                    num_prompt_tokens=event.num_prompt_tokens,
                    created=event.created,
                )
            )
        case ChoiceDelta():
            return pb.GenerateResponse(
                delta=pb.Delta(
                    index=event.index,
                    text=event.text,
                    token_ids=event.token_ids,
                    logprobs=[_logprob(logprob) for logprob in event.logprobs],
                    finish_reason=pb.FINISH_REASON_UNSPECIFIED if event.finish_reason is None else _FINISH[event.finish_reason],
                    stop_string=event.stop_string,
                    stop_token_id=event.stop_token_id,
                    parts=agents.parts_of(event.parts or ()),
                    is_read=event.parts is not None,
                )
            )
        case Completed():
            return pb.GenerateResponse(completed=pb.Completed(usage=message_from(pb.Usage, event.usage)))


def _prompt(request: pb.GenerateRequest) -> Prompt:
    match request.WhichOneof("input"):
        case "prompt":
            return TextPrompt(text=request.prompt)
        case "tokens":
            return TokenPrompt(token_ids=tuple(request.tokens.ids), field="tokens.ids")
        case "chat":
            return ChatPrompt(messages=agents.messages_of(request.chat.messages), field="chat.messages")
        case _:
            raise InvalidInput("one of prompt, tokens and chat is needed", "prompt")


def _stops(stops: Sequence[str]) -> tuple[str, ...]:
    if len(stops) > MAX_STOPS:
        raise InvalidInput(f"at most {MAX_STOPS} stop strings, not {len(stops)}", "stop")
    for index, stop in enumerate(stops):
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise InvalidInput(f"a stop string has 1 to {MAX_STOP_CHARS} characters", f"stop[{index}]")
    return tuple(stops)


def _resume(request: pb.GenerateRequest, n: int) -> dict[int, tuple[int, ...]]:
    resume: dict[int, tuple[int, ...]] = {}
    for position, part in enumerate(request.resume):
        if part.index >= n or part.index in resume:
            raise InvalidInput(f"choice {part.index} is not one of {n}, or comes twice", f"resume[{position}].index")
        resume[part.index] = tuple(part.token_ids)
    if any(resume.values()) and not request.sampling.HasField("seed"):
        raise InvalidInput("resuming needs the seed of Started", "sampling.seed")
    return resume


def _sampling_fields(sampling: pb.Sampling) -> dict[str, Any]:
    """The fields that are set; what has no presence in the proto counts as set."""
    return {
        **scalars_of(sampling),
        "logit_bias": dict(sampling.logit_bias) or None,
        "stop_token_ids": list(sampling.stop_token_ids) or None,
        "speculation": sampling.speculation or None,
    }


def _logprob(logprob: Logprob) -> pb.Logprob:
    return pb.Logprob(chosen=_probability(logprob.chosen), rank=logprob.rank, top=[_probability(p) for p in logprob.top])


def _probability(probability: TokenProbability) -> pb.TokenProbability:
    return pb.TokenProbability(
        token_id=probability.token_id, token=probability.text, token_bytes=probability.raw, logprob=probability.logprob
    )


def _composition_card(composition: ServedComposition, created: int) -> pb.ModelCard:
    lengths = [expert.context_tokens for expert in composition.document.spec.experts if expert.context_tokens is not None]
    return pb.ModelCard(
        id=composition.name,
        max_model_len=max(lengths, default=0),
        created=created,
        ready=composition.status().state != "unavailable",
    )


def _composition(status: CompositionStatus) -> pb.CompositionStatus:
    return message_from(
        pb.CompositionStatus,
        status,
        experts=[
            message_from(pb.ExpertStanding, expert.state, name=expert.name, external=expert.external, general=expert.general)
            for expert in status.experts
        ],
    )


def _worker(worker: WorkerStatus) -> pb.WorkerStatus:
    info = worker.info
    return message_from(
        pb.WorkerStatus,
        info,
        rpc_address=info.endpoint.rpc,
        data_address=info.endpoint.data,
        shard=_shard(info.role, info.shard),
        lease_remaining_s=worker.lease_remaining_s,
        connected=worker.connected,
        num_requests=worker.num_requests,
        load=encode_load(info.load),
    )


def _shard(role: Role, shard: FFNShard) -> str:
    return f"{shard.index}/{shard.num_shards}" if role is Role.FFN else ""
