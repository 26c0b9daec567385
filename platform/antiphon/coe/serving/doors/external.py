"""An external OpenAI endpoint's stream as the gateway's events (request speed). Must not know: which expert it is, grpc."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import httpx

from antiphon.coe.serving.doors.expert_key import key_headers
from antiphon.core.document.coe.experts import ExternalEndpoint
from antiphon.core.document.composition import LimitsSpec
from antiphon.core.errors import InvalidInput, Overloaded, Unavailable, UnknownModel
from antiphon.core.request import FinishReason
from antiphon.core.text.json_text import read_json_text
from antiphon.gateway.generation.request import (
    ChatPrompt,
    ChoiceDelta,
    Completed,
    Event,
    GenerationRequest,
    Logprob,
    Started,
    TextPrompt,
    TokenProbability,
    Usage,
)

_FINISH = {"length": FinishReason.LENGTH}
_MAX_ERROR_CHARS = 300


async def external_events(
    client: httpx.AsyncClient, endpoint: ExternalEndpoint, request: GenerationRequest, limits: LimitsSpec
) -> AsyncGenerator[Event, None]:
    """Ask and translate. Token ids stay with the endpoint: deltas have text only.

    Raises:
        Unavailable: it can't be reached, failed, or broke off its answer.
        Overloaded: it is busy.
        UnknownModel: it does not know the model.
        InvalidInput: it refuses the request, or the request asks for what text alone can't give.
    """
    path, body = _body(endpoint, request)
    began_s = time.monotonic()
    timeout = httpx.Timeout(limits.idle_timeout_s, connect=limits.connect_timeout_s)
    started, first_s, usage, open_choices = False, 0.0, {}, set(range(request.n))
    try:
        async with client.stream("POST", endpoint.url + path, json=body, headers=key_headers(endpoint), timeout=timeout) as answer:
            if answer.status_code >= 400:
                raise _refusal(answer.status_code, await answer.aread())
            async for event in _server_sent(answer):
                if not started:
                    started, first_s = True, time.monotonic() - began_s
                    yield Started(
                        request_id=request.request_id,
                        model=endpoint.model,
                        seed=request.sampling.seed if request.sampling.seed is not None else 0,
                        num_prompt_tokens=0,
                        created=int(time.time()),
                        prompt_texts=(),
                    )
                if isinstance(event.get("usage"), dict):
                    usage = event["usage"]
                for delta in _deltas(event, request.n):
                    if delta.finish_reason is not None:
                        open_choices.discard(delta.index)
                    yield delta
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise Unavailable(f"{type(error).__name__} at the external expert") from error
    if not started or open_choices:
        raise Unavailable("the external expert broke off its answer")
    details = usage.get("prompt_tokens_details")
    yield Completed(
        usage=Usage(
            num_prompt_tokens=_count(usage, "prompt_tokens"),
            num_completion_tokens=_count(usage, "completion_tokens"),
            num_cached_tokens=_count(details, "cached_tokens") if isinstance(details, dict) else 0,
            num_remote_tokens=0,
            num_resumptions=0,
            first_token_s=first_s,
            finished_s=time.monotonic() - began_s,
        )
    )


def _body(endpoint: ExternalEndpoint, request: GenerationRequest) -> tuple[str, dict[str, Any]]:
    sampling = request.sampling
    if sampling.num_logprobs:
        raise InvalidInput("external experts give no log-probabilities of other tokens over gRPC", "num_logprobs")
    body: dict[str, Any] = {"model": endpoint.model, "stream": True, "stream_options": {"include_usage": True}, "n": request.n}
    prompt = request.prompts[0]
    match prompt:
        case ChatPrompt():
            path = "/chat/completions"
            body["messages"] = [
                {"role": m.role, "content": m.content, **({} if m.name is None else {"name": m.name})} for m in prompt.messages
            ]
        case TextPrompt():
            path = "/completions"
            body["prompt"] = prompt.text
        case _:
            raise InvalidInput("external experts take text only", "tokens")
    if sampling.num_logprobs == 0:
        body["logprobs"] = path == "/chat/completions" or 0
    for name in ("max_tokens", "temperature", "top_p", "presence_penalty", "frequency_penalty", "seed"):
        if (value := getattr(sampling, name)) is not None:
            body[name] = value
    if request.stop:
        body["stop"] = list(request.stop)
    return path, body


async def _server_sent(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in answer.aiter_lines():
        data = line.removeprefix("data:").strip()
        if not line.startswith("data:") or data == "[DONE]":
            continue
        try:
            event = read_json_text(data)
        except ValueError as error:
            raise Unavailable("the external expert sent what is not JSON") from error
        if not isinstance(event, dict) or "error" in event:
            raise Unavailable(f"the external expert failed: {str(event)[:_MAX_ERROR_CHARS]}")
        yield event


def _deltas(event: dict[str, Any], num_choices: int) -> list[ChoiceDelta]:
    found = []
    choices = event.get("choices")
    for choice in choices if isinstance(choices, list) else []:
        if not isinstance(choice, dict) or not isinstance(choice.get("index", 0), int):
            continue
        delta = choice.get("delta")
        text = delta.get("content") if isinstance(delta, dict) else choice.get("text")
        finish = choice.get("finish_reason")
        index = choice.get("index", 0)
        logprobs = _logprobs(choice.get("logprobs"))
        if not 0 <= index < num_choices or (not text and finish is None and not logprobs):
            continue
        reason = None if finish is None else _FINISH.get(str(finish), FinishReason.STOP)
        found.append(ChoiceDelta(index=index, text=text if isinstance(text, str) else "", finish_reason=reason, logprobs=logprobs))
    return found


def _logprobs(told: object) -> tuple[Logprob, ...]:
    """Of the answer's own tokens, whose ids and texts mean nothing here."""
    if not isinstance(told, dict):
        return ()
    content, listed = told.get("content"), told.get("token_logprobs")
    values = [one.get("logprob") for one in content if isinstance(one, dict)] if isinstance(content, list) else listed
    numbers = [float(one) for one in values if isinstance(one, int | float)] if isinstance(values, list) else []
    return tuple(
        Logprob(chosen=TokenProbability(token_id=0, text="", raw=b"", logprob=number), rank=0, top=()) for number in numbers
    )


def _refusal(status: int, raw: bytes) -> Overloaded | UnknownModel | InvalidInput | Unavailable:
    text = raw.decode(errors="replace")[:_MAX_ERROR_CHARS]
    if status == 429:
        return Overloaded("the external expert is busy", retry_after_s=1.0)
    if status == 404:
        return UnknownModel(f"the external expert does not know its model: {text}", "model")
    if status in (401, 403) or status >= 500:
        return Unavailable(f"status {status} of the external expert")
    return InvalidInput(f"the external expert refuses the request: {text}")


def _count(usage: dict[str, Any], key: str) -> int:
    value = usage.get(key)
    return value if isinstance(value, int) and value >= 0 else 0
