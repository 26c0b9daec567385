"""EngineCommand and EngineUpdate to and from core.request's values (request speed).

Used at both ends of an engine session. Must not know: sessions, channels, or where requests run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from antiphon.core.errors import AntiphonError, CorruptMessage, ErrorInfo, Overloaded, Unavailable
from antiphon.core.request import (
    FinishReason,
    OutputRules,
    Pooling,
    Request,
    RequestId,
    RequestOutput,
    RequestTimes,
    SamplingParams,
    ThinkingRules,
    TokenLogprob,
)
from antiphon.rpc.errors import error_of
from antiphon.rpc.v1 import engine_pb2 as pb

_MAX_CODE_CHARS = 100  # of an error's name and words: they go into logs and to clients
_MAX_MESSAGE_CHARS = 2000
_LEAST_LOGPROB = -9999.0  # as vLLM has it


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One request's part of an update, as the gateway reads it.

    ``error`` is set when the request failed, or was aborted by anyone but this gateway.
    """

    output: RequestOutput
    error: AntiphonError | None = None


def encode_submit(request: Request, *, deadline_left_s: float | None) -> pb.EngineCommand:
    """The command that submits ``request``; ``deadline_left_s`` = seconds left now, None = no deadline."""
    return pb.EngineCommand(
        submit=pb.SubmitCommand(
            request_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            output_token_ids=request.output_token_ids,
            sampling=_encode_sampling(request.sampling),
            eos_token_ids=sorted(request.eos_token_ids),
            deadline_ms=0 if deadline_left_s is None else max(1, int(deadline_left_s * 1000)),
            priority=request.priority,
            prefill_worker=request.prefill_worker or "",
            traceparent=request.traceparent or "",
            cache_salt=request.cache_salt,
            tenant=request.tenant,
        )
    )


def decode_submit(submit: pb.SubmitCommand, *, now_s: float) -> Request:
    """The request, arrived at ``now_s`` on the engine's clock."""
    return Request(
        request_id=RequestId(submit.request_id),
        prompt_token_ids=tuple(submit.prompt_token_ids),
        output_token_ids=tuple(submit.output_token_ids),
        sampling=_decode_sampling(submit.sampling),
        eos_token_ids=frozenset(submit.eos_token_ids),
        arrival_s=now_s,
        deadline_s=now_s + submit.deadline_ms / 1000 if submit.deadline_ms else None,
        priority=submit.priority,
        prefill_worker=submit.prefill_worker or None,
        traceparent=submit.traceparent or None,
        cache_salt=submit.cache_salt,
        tenant=submit.tenant,
    )


def encode_abort(request_id: RequestId) -> pb.EngineCommand:
    """The command that aborts a request."""
    return pb.EngineCommand(abort=pb.AbortCommand(request_id=request_id))


def encode_taken(num_updates: int) -> pb.EngineCommand:
    """The command that tells how many updates more were taken; 0 at the beginning of a session says that it will."""
    return pb.EngineCommand(taken=pb.TakenCommand(num_updates=num_updates))


def encode_update(outputs: Iterable[RequestOutput]) -> pb.EngineUpdate:
    """What a step added to the requests of one gateway."""
    return pb.EngineUpdate(requests=[_encode_output(output) for output in outputs])


def encode_refusal(request_id: RequestId, error: AntiphonError) -> pb.EngineUpdate:
    """The answer to a submit that the engine did not take."""
    retry_after_s = error.retry_after_s if isinstance(error, Overloaded | Unavailable) else 0.0
    return pb.EngineUpdate(
        requests=[
            pb.RequestUpdate(
                request_id=request_id,
                finish_reason=FinishReason.ERROR.value,
                error_code=error.code,
                error_message=str(error),
                retry_after_s=retry_after_s,
            )
        ]
    )


def decode_update(update: pb.EngineUpdate, peer: str) -> list[Answer]:
    """The answers of an update, in order. An unknown finish reason counts as an error.

    Raises:
        CorruptMessage: what stands there can't be right.
    """
    try:
        return [_decode_answer(part) for part in update.requests]
    except ValueError as error:
        raise CorruptMessage(peer, str(error)) from error


def _encode_sampling(sampling: SamplingParams) -> pb.EngineSampling:
    return pb.EngineSampling(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=dict(sampling.logit_bias),
        seed=sampling.seed,
        stop_token_ids=sorted(sampling.stop_token_ids),
        min_tokens=sampling.min_tokens,
        ignore_eos=sampling.ignore_eos,
        num_logprobs=sampling.num_logprobs,
        num_prompt_logprobs=sampling.num_prompt_logprobs,
        grammar=(sampling.rules.grammar or "") if sampling.rules is not None else "",
        thinking=_encode_thinking(sampling.rules),
        pooling=_encode_pooling(sampling.pooling),
        without_speculation=not sampling.speculates,
    )


def _encode_pooling(pooling: Pooling | None) -> pb.Pooling | None:
    if pooling is None:
        return None
    return pb.Pooling(kind=pooling.kind, token_ids=pooling.token_ids, num_first_tokens=pooling.num_first_tokens)


def _decode_pooling(pooling: pb.Pooling) -> Pooling:
    return Pooling(
        kind="score" if pooling.kind == "score" else "embed",
        token_ids=tuple(pooling.token_ids),
        num_first_tokens=pooling.num_first_tokens if pooling.HasField("num_first_tokens") else None,
    )


def _encode_thinking(rules: OutputRules | None) -> pb.ThinkingRules | None:
    if rules is None or rules.thinking is None:
        return None
    thinking = rules.thinking
    return pb.ThinkingRules(
        start=thinking.start,
        end=thinking.end,
        end_token_ids=thinking.end_token_ids,
        budget_tokens=thinking.budget_tokens,
        is_open=thinking.is_open,
    )


def _decode_rules(sampling: pb.EngineSampling) -> OutputRules | None:
    if not sampling.grammar and not sampling.HasField("thinking"):
        return None
    thinking = sampling.thinking
    return OutputRules(
        grammar=sampling.grammar or None,
        thinking=ThinkingRules(
            start=thinking.start,
            end=thinking.end,
            end_token_ids=tuple(thinking.end_token_ids),
            budget_tokens=thinking.budget_tokens,
            is_open=thinking.is_open,
        )
        if sampling.HasField("thinking")
        else None,
    )


def _decode_sampling(sampling: pb.EngineSampling) -> SamplingParams:
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=dict(sampling.logit_bias),
        seed=sampling.seed,
        stop_token_ids=frozenset(sampling.stop_token_ids),
        min_tokens=sampling.min_tokens,
        ignore_eos=sampling.ignore_eos,
        num_logprobs=sampling.num_logprobs if sampling.HasField("num_logprobs") else None,
        num_prompt_logprobs=sampling.num_prompt_logprobs if sampling.HasField("num_prompt_logprobs") else None,
        rules=_decode_rules(sampling),
        pooling=_decode_pooling(sampling.pooling) if sampling.HasField("pooling") else None,
        speculates=not sampling.without_speculation,
    )


def _encode_output(output: RequestOutput) -> pb.RequestUpdate:
    times = output.times
    return pb.RequestUpdate(
        request_id=output.request_id,
        new_token_ids=output.new_token_ids,
        logprobs=[_encode_logprob(logprob) for logprob in output.logprobs],
        finish_reason=output.finish_reason.value if output.finish_reason is not None else "",
        error_code="" if output.error is None else output.error.code,
        error_message="" if output.error is None else output.error.message,
        stop_token_id=output.stop_token_id,
        num_cached_tokens=output.num_cached_tokens,
        num_remote_tokens=output.num_remote_tokens,
        num_preemptions=output.num_preemptions,
        times=None
        if times is None
        else pb.RequestTimes(
            queue_s=_since(times.arrival_s, times.scheduled_s),
            first_token_s=_since(times.arrival_s, times.first_token_s),
            finished_s=_since(times.arrival_s, times.finished_s),
        ),
        prompt_logprobs={position: _encode_logprob(logprob) for position, logprob in output.prompt_logprobs.items()},
        vector=output.vector,
    )


def _since(start_s: float, moment_s: float | None) -> float:
    return 0.0 if moment_s is None else moment_s - start_s


def _encode_logprob(logprob: TokenLogprob) -> pb.TokenLogprob:
    return pb.TokenLogprob(
        token_id=logprob.token_id,
        logprob=logprob.logprob,
        rank=logprob.rank,
        top_token_ids=[token_id for token_id, _ in logprob.top],
        top_logprobs=[value for _, value in logprob.top],
    )


def _decode_answer(part: pb.RequestUpdate) -> Answer:
    finish_reason = _decode_finish(part.finish_reason)
    code = part.error_code[:_MAX_CODE_CHARS]
    message = part.error_message[:_MAX_MESSAGE_CHARS] or code or f"the engine ended the request with {part.finish_reason[:40]!r}"
    error: AntiphonError | None = None
    if finish_reason is FinishReason.ERROR or code:
        error = error_of(code, message, retry_after_s=part.retry_after_s if part.retry_after_s > 0 else None)
    output = RequestOutput(
        request_id=RequestId(part.request_id),
        new_token_ids=tuple(part.new_token_ids),
        logprobs=tuple(_decode_logprob(logprob) for logprob in part.logprobs),
        finish_reason=finish_reason,
        error=None if error is None else ErrorInfo(code=code or error.code, message=message, retryable=error.retryable),
        stop_token_id=part.stop_token_id if part.HasField("stop_token_id") else None,
        num_cached_tokens=part.num_cached_tokens,
        num_remote_tokens=part.num_remote_tokens,
        num_preemptions=part.num_preemptions,
        times=_decode_times(part.times) if part.HasField("times") else None,
        prompt_logprobs={position: _decode_logprob(logprob) for position, logprob in part.prompt_logprobs.items()},
        vector=_decode_vector(part.vector),
    )
    return Answer(output=output, error=error)


def _decode_vector(values: Sequence[float]) -> tuple[float, ...]:
    vector = tuple(values)
    if not math.isfinite(sum(vector)):
        raise ValueError("a vector with a number that is none")
    return vector


def _decode_finish(text: str) -> FinishReason | None:
    if not text:
        return None
    try:
        return FinishReason(text)
    except ValueError:
        return FinishReason.ERROR


def _decode_times(times: pb.RequestTimes) -> RequestTimes:
    return RequestTimes(
        arrival_s=0.0,
        scheduled_s=_time(times.queue_s),
        first_token_s=_time(times.first_token_s),
        finished_s=_time(times.finished_s),
    )


def _time(value_s: float) -> float | None:
    return value_s if 0.0 < value_s < math.inf else None


def _decode_logprob(logprob: pb.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(
        token_id=logprob.token_id,
        logprob=_finite(logprob.logprob),
        rank=logprob.rank,
        top=tuple(zip(logprob.top_token_ids, map(_finite, logprob.top_logprobs), strict=True)),
    )


def _finite(logprob: float) -> float:
    """JSON has no infinity."""
    if logprob < math.inf:
        return max(logprob, _LEAST_LOGPROB)
    raise ValueError(f"a log probability of {logprob}")
