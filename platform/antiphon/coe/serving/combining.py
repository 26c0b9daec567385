"""More than one expert for a request: who is asked, what is taken, and who said what (request speed).

    cascade   a ─► check ── accepted ─► its answer        vote   a ┐
              └─ rejected, failed ─► b ─► check ─► ...           b ├─► groups of equal answers ─► the largest, when large enough
              └─ nobody left ─► the last one, or declined        c ┘                           └─► the largest, or declined

What is asked is bounded by the document: each expert once, tokens over all of them, seconds each. Nothing is sent before an
answer is taken, so only a cascade's last expert, which nobody checks, can be streamed while it speaks. Must not know: HTTP, gRPC.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Literal, TypeVar

from antiphon.coe.routing.decision import Reason
from antiphon.coe.routing.router import Record
from antiphon.coe.serving.circuit_breaker import Breaker
from antiphon.core.document.coe.combining import CheckSpec, CombineSpec
from antiphon.core.document.composition import CompositionSpec
from antiphon.core.errors import AntiphonError, Unavailable

P = TypeVar("P")

_WEIGHED = frozenset({Reason.SCORE, Reason.STICKY, Reason.UNCERTAIN, Reason.NO_ROUTER})
_MAX_LOGIT = 30.0
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")
_EDGE = " \t\r\n.!?:;,*`\"'()[]{}$"


class Declined(AntiphonError):
    """No answer is good enough by the document's own measure; asking again brings the same."""

    code = "declined"
    http_status = 422
    grpc_status = "FAILED_PRECONDITION"


class AskFailed(Exception):
    """An expert gave no answer; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer(Generic[P]):
    """A whole answer that nobody has seen yet."""

    text: str
    mean_logprob: float | None  # of its tokens; None = not told
    num_prompt_tokens: int
    num_completion_tokens: int
    payload: P


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One expert's part in an answer. ``chance`` is the check's, of a good answer."""

    expert: str
    outcome: Literal["accepted", "rejected", "agreed", "outvoted", "unchecked", "failed", "stopped"]
    chance: float | None = None
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    why: str = ""

    def __str__(self) -> str:
        detail = self.why or ("" if self.chance is None else f"{self.chance:.2f}")
        return f"{self.expert} {self.outcome}" + (f" {detail}" if detail else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Combined(Generic[P]):
    """What came of asking. Either an ``answer`` of ``expert``, or ``expert`` alone: its own answer may be passed on as it comes."""

    expert: str
    answer: Answer[P] | None
    asked: tuple[Asked, ...]


Ask = Callable[[str], Awaitable[Answer[P]]]


def experts_to_combine(
    document: CompositionSpec, breakers: Mapping[str, Breaker], record: Record, *, num_choices: int, calls_tools: bool
) -> tuple[str, ...]:
    """The experts to ask for this request; none where one expert answers it.

    One answers what names an expert, a rule or a mapping of the document decides, several choices, and for a vote what may call
    tools, since calls are not compared.
    """
    spec = document.combine
    if spec is None or record.decision.reason not in _WEIGHED or num_choices != 1 or (spec.mode == "vote" and calls_tools):
        return ()
    blocked = {candidate.expert for candidate in record.decision.candidates if candidate.block is not None}
    able = tuple(name for name in spec.experts if name not in blocked and not breakers[name].is_open)
    return able if len(able) > 1 else ()


def decline_early(document: CompositionSpec, record: Record) -> None:
    """Refuse what even the best expert is not expected to answer well.

    Raises:
        Declined: the document says so.
    """
    below = document.gate.decline_below
    if below is None or record.judgement is None or record.decision.reason not in _WEIGHED:
        return
    best = max((c.score for c in record.decision.candidates if c.block is None), default=1.0)
    if best < below:
        raise Declined(f"no expert is expected to answer this well: {best:.2f}, and the composition asks for {below:g}")


def chance_of(check: CheckSpec, answer: Answer[P]) -> float | None:
    """The chance of a good answer (Platt scaling of the mean log-probability); None where the expert tells no probabilities."""
    if answer.mean_logprob is None:
        return None
    logit = min(max(check.weight * answer.mean_logprob + check.bias, -_MAX_LOGIT), _MAX_LOGIT)
    return 1.0 / (1.0 + math.exp(-logit))


async def combine(spec: CombineSpec, experts: Sequence[str], ask: Ask[P], *, pass_on_last: bool) -> Combined[P]:
    """Ask as the document says; ``pass_on_last``: an unchecked last expert of a cascade is left to the caller.

    Raises:
        Declined: no answer was good enough and the document declines then.
        Unavailable: nobody answered.
    """
    if spec.mode == "vote":
        return await _vote(spec, experts, ask)
    return await _cascade(spec, experts, ask, pass_on_last)


async def _cascade(spec: CombineSpec, experts: Sequence[str], ask: Ask[P], pass_on_last: bool) -> Combined[P]:
    asked: list[Asked] = []
    held: list[tuple[float, int, str, Answer[P]]] = []  # rejected answers
    for index, expert in enumerate(experts):
        unchecked = index == len(experts) - 1 and spec.otherwise == "answer"
        if spec.max_tokens is not None and sum(a.num_prompt_tokens + a.num_completion_tokens for a in asked) >= spec.max_tokens:
            asked.append(Asked(expert=expert, outcome="stopped", why="tokens used up"))
            break
        if unchecked and pass_on_last:
            asked.append(Asked(expert=expert, outcome="unchecked"))
            return Combined(expert=expert, answer=None, asked=tuple(asked))
        try:
            answer = await _asked(spec, ask, expert)
        except AskFailed as error:
            asked.append(Asked(expert=expert, outcome="failed", why=str(error)))
            continue
        if unchecked:
            asked.append(_said(expert, answer, "unchecked"))
            return Combined(expert=expert, answer=answer, asked=tuple(asked))
        check = spec.check(expert)
        chance = None if check is None else chance_of(check, answer)
        if chance is not None and chance >= spec.accept:
            asked.append(_said(expert, answer, "accepted", chance))
            return Combined(expert=expert, answer=answer, asked=tuple(asked))
        asked.append(_said(expert, answer, "rejected", chance, "" if chance is not None else "told no probabilities"))
        held.append((-1.0 if chance is None else chance, index, expert, answer))
    return _left(spec, held, asked)


async def _vote(spec: CombineSpec, experts: Sequence[str], ask: Ask[P]) -> Combined[P]:
    tasks = {expert: asyncio.ensure_future(_asked(spec, ask, expert)) for expert in experts}
    groups: dict[str, list[str]] = {}
    pending = set(tasks.values())
    try:
        while pending and not _decided(spec, groups, len(pending)):
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for expert, task in tasks.items():
                if task in done and not isinstance(task.exception(), AskFailed):
                    groups.setdefault(_compared(spec, task.result().text), []).append(expert)
    finally:
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
    place = {expert: i for i, expert in enumerate(experts)}
    ordered = [sorted(group, key=place.__getitem__) for group in groups.values()]
    ordered.sort(key=lambda group: (-len(group), place[group[0]]))
    winners = ordered[0] if ordered else []
    asked = []
    for expert, task in tasks.items():
        if task.cancelled():
            asked.append(Asked(expert=expert, outcome="stopped", why="decided without it"))
        elif (error := task.exception()) is not None:
            asked.append(Asked(expert=expert, outcome="failed", why=str(error)))
        else:
            asked.append(_said(expert, task.result(), "agreed" if expert in winners else "outvoted"))
    if winners and len(winners) >= spec.min_votes:
        return Combined(expert=winners[0], answer=tasks[winners[0]].result(), asked=tuple(asked))
    held = [(float(len(group)), -place[group[0]], group[0], tasks[group[0]].result()) for group in ordered]
    return _left(spec, held, asked)


def _decided(spec: CombineSpec, groups: dict[str, list[str]], num_pending: int) -> bool:
    """Whether no answer that is still to come can change which group is the largest."""
    sizes = sorted((len(group) for group in groups.values()), reverse=True)
    return bool(sizes) and sizes[0] >= spec.min_votes and sizes[0] > (sizes[1] if len(sizes) > 1 else 0) + num_pending


async def _asked(spec: CombineSpec, ask: Ask[P], expert: str) -> Answer[P]:
    try:
        async with asyncio.timeout(spec.step_timeout_s):
            return await ask(expert)
    except TimeoutError as error:
        raise AskFailed("not finished in time") from error


def _left(spec: CombineSpec, held: Sequence[tuple[float, int, str, Answer[P]]], asked: Sequence[Asked]) -> Combined[P]:
    """What nobody accepted: the best of it, or nothing."""
    said = ", ".join(map(str, asked))
    if not held:
        raise Unavailable(f"no expert could answer ({said})")
    if spec.otherwise == "decline":
        raise Declined(f"no answer was good enough ({said})")
    _, _, expert, answer = max(held, key=lambda one: one[:2])
    return Combined(expert=expert, answer=answer, asked=tuple(asked))


def _said(
    expert: str,
    answer: Answer[P],
    outcome: Literal["accepted", "rejected", "agreed", "outvoted", "unchecked"],
    chance: float | None = None,
    why: str = "",
) -> Asked:
    said = Asked(expert=expert, outcome=outcome, chance=chance, why=why)
    return replace(said, num_prompt_tokens=answer.num_prompt_tokens, num_completion_tokens=answer.num_completion_tokens)


def _compared(spec: CombineSpec, text: str) -> str:
    """What must be equal for two answers to be one."""
    match spec.compare:
        case "last-number":
            numbers = _NUMBER.findall(text)
            if numbers:
                return repr(float(numbers[-1].replace(",", "")))
        case "last-line":
            text = next((line for line in reversed(text.splitlines()) if line.strip(_EDGE)), text)
        case "whole":
            pass
    return " ".join(text.lower().split()).strip(_EDGE)
