"""Answers a GenerationRequest for a composition: route, let the expert generate, fall back before its first word (request speed).

The gRPC door's way to the experts. Which expert answers a request is noted in the directory, so that a client which lost its
connection goes on with the same one, at whichever gateway. Must not know: grpc, how the router decides.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from antiphon.coe.routing.router import Record
from antiphon.coe.serving.combining import Answer, AskFailed, combine, decline_early, experts_to_combine
from antiphon.coe.serving.composition import Composition
from antiphon.coe.serving.doors.attempt import answer_headers, quoted
from antiphon.coe.serving.doors.connections import open_client
from antiphon.coe.serving.doors.external import external_events
from antiphon.coe.serving.doors.held_events import given_events, held_answer, total_of
from antiphon.coe.serving.doors.question import question_of
from antiphon.coe.serving.fallback import Fallback, Turn
from antiphon.core.directory import Notes
from antiphon.core.document.composition import split_model_name
from antiphon.core.errors import (
    AntiphonError,
    DeadlineExceeded,
    InternalError,
    InvalidInput,
    Overloaded,
    Unavailable,
    UnknownModel,
)
from antiphon.gateway.generation.request import ChatPrompt, Completed, Event, GenerationRequest, TextPrompt
from antiphon.rpc.inference import Announce

Generate = Callable[[GenerationRequest], AsyncGenerator[Event, None]]

_NOTE_TIMEOUT_S = 0.2
_MAX_ID_CHARS = 120  # a number is put behind
_RESUMABLE_S = 600.0  # how long a broken answer can be asked for
_TRY_NEXT = (Overloaded, Unavailable, DeadlineExceeded, InternalError, UnknownModel)


class CoeGenerator:
    """Generates for compositions. Belongs to one event loop; ``close`` is idempotent.

    Args:
        compositions: by metadata.name.
        generate: the gateway's own, for experts that are served here.
        notes: remembers which expert answers a request.
    """

    def __init__(self, compositions: Mapping[str, Composition], generate: Generate, notes: Notes) -> None:
        self._compositions = compositions
        self._generate = generate
        self._notes = notes
        self._client = open_client()

    async def close(self) -> None:
        """Close connections to external experts."""
        await self._client.aclose()

    async def generate(
        self, request: GenerationRequest, headers: Mapping[str, str], announce: Announce
    ) -> AsyncGenerator[Event, None]:
        """The answer of the expert that the router picks; ``announce`` is told who it is before the first event.

        Raises:
            UnknownModel: there is no such composition or policy.
            InvalidInput: no expert can be asked for this, or a broken answer can't be gone on with.
            Unavailable: no expert could answer.
        """
        named = split_model_name(request.model)
        if named is None or named[0] not in self._compositions:
            raise UnknownModel(f"the model {request.model!r} does not exist", "model")
        name, policy = named
        composition = self._compositions[name]
        if any(request.resume.values()):
            expert = await self._resumed(composition, request)
            await announce({"x-antiphon-expert": expert, "x-antiphon-reason": "resumed"})
            async for event in self._generate(replace(request, model=composition.model_of(expert))):
                yield event
            return
        question = question_of(_body(request), headers, composition.document.spec, policy, tenant=request.tenant)
        record = await composition.route(question)
        decline_early(composition.document.spec, record)
        fallback = Fallback(composition, question, record)
        experts = experts_to_combine(
            composition.document.spec, composition.breakers, record, num_choices=request.n * len(request.prompts), calls_tools=False
        )
        if experts:
            async for event in self._combined(composition, request, fallback, record, experts, announce):
                yield event
            return
        async for event in self._first_to_answer(
            composition, request, fallback, lambda expert: announce(answer_headers(record, expert, fallback.failures))
        ):
            yield event

    async def _combined(
        self,
        composition: Composition,
        request: GenerationRequest,
        fallback: Fallback,
        record: Record,
        experts: Sequence[str],
        announce: Announce,
    ) -> AsyncGenerator[Event, None]:
        """Ask several experts; nothing is sent before an answer is taken."""
        spec = composition.document.spec.combine
        assert spec is not None  # experts were found in it
        end_s = None if request.deadline_s is None else time.monotonic() + request.deadline_s
        numbers = itertools.count(1)

        def part(turn: Turn) -> GenerationRequest:
            return replace(
                request,
                request_id=f"{request.request_id[:_MAX_ID_CHARS]}.{next(numbers)}",
                deadline_s=None if end_s is None else max(0.0, end_s - time.monotonic()),
                placement_timeout_s=turn.placement_timeout_s,
            )

        async def ask(expert: str) -> Answer[list[Event]]:
            turn = Turn(expert=expert, endpoint=composition.external(expert), last=False)
            asked = part(turn)
            if asked.sampling.num_logprobs is None:
                asked = replace(asked, sampling=replace(asked.sampling, num_logprobs=0))
            try:
                async with aclosing(self._ask(composition, turn, asked, fallback)) as events:
                    return held_answer([event async for event in events])
            except (*_TRY_NEXT, InvalidInput) as error:
                raise AskFailed(str(error)) from error

        try:
            async with asyncio.timeout(request.deadline_s):
                found = await combine(spec, experts, ask, pass_on_last=True)
        except TimeoutError as error:
            raise DeadlineExceeded("the request's deadline has passed") from error
        composition.note_asked(record.decision_id, found.asked)
        headers = {"x-antiphon-combined": spec.mode, "x-antiphon-asked": quoted("; ".join(map(str, found.asked)))}
        turn = Turn(expert=found.expert, endpoint=composition.external(found.expert), last=True)
        headers = {**answer_headers(record, found.expert, []), **headers}
        if found.answer is not None:
            await announce(headers)
            for event in given_events(found.answer.payload, request, found.asked):
                yield event
        else:
            started = False
            async with aclosing(self._ask(composition, turn, part(turn), fallback)) as events:
                async for event in events:
                    if not started:
                        started = True
                        await announce(headers)
                    yield event if not isinstance(event, Completed) else total_of(event, found.asked)
        await fallback.answered(turn)

    async def _first_to_answer(
        self, composition: Composition, request: GenerationRequest, fallback: Fallback, announce: Callable[[str], Awaitable[None]]
    ) -> AsyncGenerator[Event, None]:
        end_s = None if request.deadline_s is None else time.monotonic() + request.deadline_s
        for turn in fallback.turns():
            left_s = None if end_s is None else end_s - time.monotonic()
            started = False
            try:
                asked = replace(request, deadline_s=left_s, placement_timeout_s=turn.placement_timeout_s)
                async with aclosing(self._ask(composition, turn, asked, fallback)) as events:
                    async for event in events:
                        if not started:
                            started = True
                            await announce(turn.expert)
                            await self._note(composition, request, turn.expert)
                        yield event
            except _TRY_NEXT as error:
                if started or turn.last or (end_s is not None and time.monotonic() >= end_s):
                    raise
                fallback.failed(turn, str(error))
                continue
            await fallback.answered(turn)
            return
        raise fallback.nobody()

    async def _ask(
        self, composition: Composition, turn: Turn, request: GenerationRequest, fallback: Fallback
    ) -> AsyncGenerator[Event, None]:
        """One expert's events; its first must come in time. Its circuit learns how it went."""
        limits = composition.document.spec.limits
        with fallback.asking(turn) as breaker:
            if turn.endpoint is None:
                events = self._generate(replace(request, model=composition.model_of(turn.expert)))
            else:
                events = external_events(self._client, turn.endpoint, request, limits)
            try:
                async with aclosing(events):
                    async with asyncio.timeout(limits.first_token_timeout_s):
                        first = await anext(events)
                    breaker.succeeded()
                    yield first
                    async for event in events:
                        yield event
            except TimeoutError as error:
                breaker.failed()
                raise Unavailable("sent nothing in time") from error
            except (Unavailable, InternalError):
                breaker.failed()
                raise

    async def _resumed(self, composition: Composition, request: GenerationRequest) -> str:
        """The expert that the client has the beginning of."""
        expert = None
        try:
            async with asyncio.timeout(_NOTE_TIMEOUT_S):
                expert = await self._notes.note(_topic(composition), request.request_id)
        except (AntiphonError, TimeoutError) as error:
            raise Unavailable(f"which expert answered {request.request_id} can't be looked up: {error}") from error
        if expert is None or expert not in composition.breakers:
            raise InvalidInput(f"there is no record of an answer to {request.request_id}", "resume")
        if composition.external(expert) is not None:
            raise InvalidInput(f"expert {expert} is external: its answers can't be gone on with", "resume")
        return expert

    async def _note(self, composition: Composition, request: GenerationRequest, expert: str) -> None:
        try:
            async with asyncio.timeout(_NOTE_TIMEOUT_S):
                await self._notes.put_note(_topic(composition), request.request_id, expert, _RESUMABLE_S)
        except (AntiphonError, TimeoutError):
            return  # a lost connection then means a new request


def _topic(composition: Composition) -> str:
    return f"coe/{composition.document.metadata.name}/requests"


def _body(request: GenerationRequest) -> dict[str, Any]:
    """The request in the form that questions are made of."""
    prompt = request.prompts[0]
    body: dict[str, Any] = {"max_tokens": request.sampling.max_tokens}
    match prompt:
        case TextPrompt():
            body["prompt"] = prompt.text
        case ChatPrompt():
            body["messages"] = [{"role": m.role, "content": m.content} for m in prompt.messages]
        case _:
            raise InvalidInput("a composition takes text: token ids mean another text to every expert", "tokens")
    return body
