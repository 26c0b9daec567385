"""The one span of a request at the gateway, after the GenAI semantic conventions (request speed).

Prompts and answers are recorded only where OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT is true in the gateway's environment,
in the conventions' shape of messages and parts; stop strings never. Must not know: how requests are answered.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from antiphon.core.errors import AntiphonError, InvalidInput
from antiphon.gateway.generation.choice_run import ChoiceRun
from antiphon.gateway.generation.request import (
    ChatPrompt,
    ChoiceDelta,
    Completed,
    Event,
    GenerationRequest,
    Prompt,
    TextPrompt,
)
from antiphon.telemetry import SpanKind, Status, StatusCode, Tracer, context_of, semconv, traceparent_of


class RequestSpan:
    """Opened with the request, ended with it. Belongs to the request's task."""

    def __init__(self, tracer: Tracer, request: GenerationRequest, *, with_content: bool = False) -> None:
        sampling = request.sampling
        self._span = tracer.start_span(
            f"{request.operation} {request.model}",
            context_of(request.traceparent),
            SpanKind.SERVER,
            {
                semconv.OPERATION_NAME: request.operation,
                semconv.PROVIDER_NAME: semconv.PROVIDER_ANTIPHON,
                semconv.REQUEST_MODEL: request.model,
                semconv.REQUEST_TEMPERATURE: sampling.temperature,
                semconv.REQUEST_TOP_P: sampling.top_p,
                semconv.REQUEST_STREAM: request.stream,
                semconv.REQUEST_ID: request.request_id,
            },
        )
        if self._span.is_recording():
            for name, value, unset in (
                (semconv.REQUEST_MAX_TOKENS, sampling.max_tokens, None),
                (semconv.REQUEST_SEED, sampling.seed, None),
                (semconv.REQUEST_TOP_K, sampling.top_k, 0),
                (semconv.REQUEST_CHOICE_COUNT, request.n, 1),
                (semconv.REQUEST_FREQUENCY_PENALTY, sampling.frequency_penalty, 0.0),
                (semconv.REQUEST_PRESENCE_PENALTY, sampling.presence_penalty, 0.0),
            ):
                # Attributes are signed 64-bit.
                if value is not None and value != unset and abs(value) < 2**63:
                    self._span.set_attribute(name, value)
        # Without tracing here, the caller's context still reaches the workers.
        self.traceparent = traceparent_of(self._span) or request.traceparent
        self._finish_reasons: dict[int, str] = {}
        self._texts: dict[int, list[str]] | None = None
        if with_content and self._span.is_recording():
            self._texts = {}
            said = [message for prompt in request.prompts for message in _messages(prompt)]
            self._span.set_attribute(semconv.INPUT_MESSAGES, json.dumps(said, ensure_ascii=False))

    def event(self, event: Event) -> None:
        """Note what the answer says about itself."""
        if isinstance(event, ChoiceDelta):
            if self._texts is not None:
                self._texts.setdefault(event.index, []).append(event.text)
            if event.finish_reason is not None:
                self._finish_reasons[event.index] = event.finish_reason.value
        elif isinstance(event, Completed):
            usage = event.usage
            self._span.set_attributes(
                {
                    semconv.USAGE_INPUT_TOKENS: usage.num_prompt_tokens,
                    semconv.USAGE_OUTPUT_TOKENS: usage.num_completion_tokens,
                    semconv.USAGE_CACHE_READ_INPUT_TOKENS: usage.num_cached_tokens,
                    semconv.NUM_REMOTE_TOKENS: usage.num_remote_tokens,
                    semconv.RESPONSE_TIME_TO_FIRST_CHUNK: usage.first_token_s,
                    semconv.RESPONSE_FINISH_REASONS: [self._finish_reasons[i] for i in sorted(self._finish_reasons)],
                }
            )

    def routed(self, runs: Sequence[ChoiceRun]) -> None:
        """Note where the choices went."""
        workers = [plan.worker for run in runs for plan in run.progress.plans]
        if workers:
            self._span.set_attribute(semconv.WORKER, workers)

    def failed(self, error: AntiphonError) -> None:
        """Note how it failed. What is wrong with a request quotes it: its schema, its grammar, what its template says of it."""
        self._span.set_attribute(semconv.ERROR_TYPE, error.code)
        told = _without_quotes(error) if isinstance(error, InvalidInput) and self._texts is None else str(error)
        self._span.set_status(Status(StatusCode.ERROR, told))

    def end(self) -> None:
        """The request is over."""
        if self._texts:
            said = [
                {**_message("assistant", "".join(parts)), "finish_reason": self._finish_reasons.get(index, "error")}
                for index, parts in sorted(self._texts.items())
            ]
            self._span.set_attribute(semconv.OUTPUT_MESSAGES, json.dumps(said, ensure_ascii=False))
        self._span.end()


def _without_quotes(error: InvalidInput) -> str:
    return error.code if error.field is None else f"{error.field.partition('[')[0]}: {error.code}"


def captures_content(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether whoever runs this gateway wants prompts and answers in its traces."""
    return environment.get(semconv.CONTENT_VARIABLE, "").strip().lower() == "true"


def _messages(prompt: Prompt) -> list[dict[str, Any]]:
    match prompt:
        case ChatPrompt():
            return [_message(each.role, each.content) for each in prompt.messages]
        case TextPrompt():
            return [_message("user", prompt.text)]
        case _:
            return []  # token ids are no text yet


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "parts": [{"type": "text", "content": text}]}
