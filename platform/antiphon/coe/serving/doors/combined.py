"""Several experts for one HTTP request: held answers until one is taken, then that one (request speed).

Must not know: how one expert is reached, which answers are taken.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from fastapi.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from antiphon.coe.routing.decision import Question
from antiphon.coe.routing.router import Record
from antiphon.coe.serving.combining import Answer, AskFailed, combine
from antiphon.coe.serving.composition import Composition
from antiphon.coe.serving.doors.attempt import Attempt, answer_headers, quoted, scope_of_part, while_connected
from antiphon.coe.serving.doors.held import Held, answer_of, asking_body, given_body, quiet, stream_of
from antiphon.coe.serving.fallback import Fallback, Turn
from antiphon.core.errors import DeadlineExceeded, Unavailable
from antiphon.gateway.openai.http_io import error_response

# One expert's try at a request; what came of it stands in the attempt.
Try = Callable[[Composition, Turn, dict[str, Any], Attempt, Scope, Receive, Fallback], Awaitable[None]]


async def answer_combined(
    try_: Try,
    composition: Composition,
    question: Question,
    record: Record,
    experts: Sequence[str],
    body: dict[str, Any],
    deadline_s: float | None,
    scope: Scope,
    receive: Receive,
    send: Send,
) -> None:
    """Ask several experts; nothing is sent before an answer is taken."""
    spec = composition.document.spec.combine
    assert spec is not None  # experts were found in it
    is_chat = scope["path"] == "/v1/chat/completions"
    started = False
    fallback = Fallback(composition, question, record)
    served: Turn | None = None  # who answered: noted below, since a response that is whole ends the work like a client that left

    async def work() -> None:
        nonlocal started, served
        numbers = itertools.count(1)

        async def ask(expert: str) -> Answer[dict[str, Any]]:
            turn = Turn(expert=expert, endpoint=composition.external(expert), last=False)
            own = scope_of_part(scope, next(numbers))
            return await _hold(try_, composition, turn, asking_body(body, is_chat), own, fallback)

        found = await combine(spec, experts, ask, pass_on_last=bool(body.get("stream")))
        composition.note_asked(record.decision_id, found.asked)
        headers = {
            **answer_headers(record, found.expert, []),
            "x-antiphon-combined": spec.mode,
            "x-antiphon-asked": quoted("; ".join(map(str, found.asked))),
        }
        turn = Turn(expert=found.expert, endpoint=composition.external(found.expert), last=True)
        if found.answer is None:
            attempt = Attempt(send, headers, take_any=True)
            try:
                await try_(composition, turn, body, attempt, scope, quiet, fallback)
            finally:
                started = attempt.started
                served = turn if started and not attempt.failed else None
            if not attempt.started:
                fallback.failed(turn, attempt.why)
                raise fallback.nobody()
        else:
            said = {"decision_id": record.decision_id, "mode": spec.mode, "expert": found.expert}
            given = given_body(found.answer, body, said, found.asked)
            response: Response = JSONResponse(given, headers=headers)
            if body.get("stream"):
                response = Response(stream_of(given, body, is_chat), headers=headers, media_type="text/event-stream")
            started, served = True, turn
            await response(scope, receive, send)

    try:
        async with asyncio.timeout(deadline_s):
            await while_connected(work(), receive)
        if served is not None:
            await fallback.answered(served)
    except TimeoutError:
        if started:
            raise  # the connection is broken off: the client has seen a part
        await error_response(DeadlineExceeded("the request's deadline has passed"))(scope, receive, send)
    except Exception as error:
        if started:
            raise
        await error_response(error)(scope, receive, send)


async def _hold(
    try_: Try, composition: Composition, turn: Turn, body: dict[str, Any], scope: Scope, fallback: Fallback
) -> Answer[dict[str, Any]]:
    """One expert's whole answer, which the client has not seen.

    Raises:
        AskFailed: it gave none.
    """
    held = Held()
    attempt = Attempt(held.send, {}, take_any=False)
    try:
        await try_(composition, turn, body, attempt, scope, quiet, fallback)
    except Unavailable as error:
        raise AskFailed(str(error)) from error
    if not attempt.started or attempt.failed:
        raise AskFailed(attempt.why or "failed")
    return answer_of(held.body)
