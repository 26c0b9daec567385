"""One choice from its prompt to its finish, over as many workers as it takes (request speed).

    place ─► submit ─► tokens ... ─► finish
      ▲                  │
      └── worker lost ◄──┘   with output_token_ids = the tokens so far: no gap, no duplicate

A choice that was lost goes on until the request's deadline, unless nobody has seen any of the request's tokens: then it
looks for a worker for ``placement_timeout_s``. Where the model's pool may sleep, a new choice waits for it to wake. A choice that
takes its workers down with it is given up.

Must not know: the doors, or the other choices.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from antiphon.core.errors import Overloaded, PeerLost, StructureRefused, Unavailable
from antiphon.core.ids import WorkerId
from antiphon.core.request import FinishReason, Request, RequestId, RequestOutput, SamplingParams, TokenLogprob
from antiphon.directory.workers import WorkerView
from antiphon.gateway.generation.request import ChoiceDelta, Logprob, TokenProbability
from antiphon.gateway.routing.engine_client import EngineClient
from antiphon.gateway.routing.picker import RoutePlan
from antiphon.gateway.routing.placement import Placement
from antiphon.gateway.routing.waking import Waking
from antiphon.gateway.text.choice_text import ChoiceText
from antiphon.gateway.text.dialect import AnswerPlan
from antiphon.gateway.text.events import Part, merged
from antiphon.gateway.text.tokenizer import TextModel

_log = logging.getLogger(__name__)

MAX_LOSSES = 5  # workers lost in a row without a token from any of them
_MIN_PAUSE_S = 0.05
_MAX_PAUSE_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceSpec:
    """What one choice asks its engine for."""

    index: int
    request_id: str
    model: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    eos_token_ids: frozenset[int]
    client_stop_token_ids: frozenset[int]
    stops: tuple[str, ...]
    include_stop: bool
    skip_special_tokens: bool
    deadline_s: float  # on the gateway's clock
    priority: int
    cache_salt: str
    tenant: str
    traceparent: str | None
    resume: tuple[int, ...]
    token_by_token: bool = False
    plan: AnswerPlan = field(default_factory=AnswerPlan)
    is_prompt_only: bool = False  # nothing but the prompt's likelihoods is wanted: the one token it takes is dropped


@dataclass(slots=True)
class ChoiceProgress:
    """Where a choice stands; written by its run, read by the request's owner."""

    token_ids: list[int]
    num_cached_tokens: int = 0
    num_remote_tokens: int = 0
    num_resumptions: int = 0
    queue_s: float | None = None
    num_thought_tokens: int = 0
    prompt_logprobs: dict[int, TokenLogprob] = field(default_factory=dict)  # by position in the prompt
    plans: list[RoutePlan] = field(default_factory=list)  # one per worker that was tried


@dataclass(slots=True)
class _Trouble:
    """What went wrong since the last token."""

    excluded: set[WorkerId] = field(default_factory=set)
    num_failures: int = 0
    num_losses: int = 0
    since_s: float | None = None


class ChoiceRun:
    """Runs one choice. Belongs to one event loop.

    Args:
        spec: what is asked for.
        text_model: the model's tokenizer.
        committed: whether the client has been told anything of this request yet.
        placement_timeout_s: see the module.
        waking: how long it waits for the first worker of a pool that sleeps.
    """

    def __init__(
        self,
        spec: ChoiceSpec,
        *,
        text_model: TextModel,
        placement: Placement,
        client: EngineClient,
        view: WorkerView,
        committed: Callable[[], bool],
        clock: Callable[[], float],
        placement_timeout_s: float,
        waking: Waking,
    ) -> None:
        self._spec = spec
        self._text_model = text_model
        self._placement = placement
        self._client = client
        self._view = view
        self._committed = committed
        self._clock = clock
        self._placement_timeout_s = placement_timeout_s
        self._waking = waking
        self._text = ChoiceText(
            text_model,
            stops=spec.stops,
            include_stop=spec.include_stop,
            min_tokens=spec.sampling.min_tokens,
            skip_special_tokens=spec.skip_special_tokens,
            kept=spec.plan.kept,
            parser=spec.plan.new_parser(),
        )
        self._revision: str | None = None
        self._trouble = _Trouble()
        self._has_told_prompt = False
        self.progress = ChoiceProgress(token_ids=list(spec.resume))

    async def deltas(self) -> AsyncGenerator[ChoiceDelta, None]:
        """The choice, to its finish. Leaving early aborts it at the engine.

        Raises:
            AntiphonError: it can't be finished.
        """
        self._text.feed(self._spec.resume)  # the client has this text
        if len(self._spec.resume) >= self._spec.sampling.max_tokens:
            piece = self._text.finish((), stop_token=False, truncated=True)
            yield ChoiceDelta(
                index=self._spec.index, text=piece.text, parts=self._parts(piece.parts), finish_reason=FinishReason.LENGTH
            )
            return
        while True:
            num_tokens = len(self.progress.token_ids)
            plan: RoutePlan | None = None
            try:
                plan = await self._place_or_wake()
                async with aclosing(self._on_worker(plan)) as deltas:
                    async for delta in deltas:
                        yield delta
                        if delta.finish_reason is not None:
                            return
            except StructureRefused as error:
                raise StructureRefused(f"{self._spec.plan.grammar_field}: {error}", self._spec.plan.grammar_field) from error
            except (Unavailable, Overloaded) as error:
                if len(self.progress.token_ids) > num_tokens:
                    self._trouble = _Trouble()
                self._note_failure(error, plan)
            await self._pause()

    async def _place_or_wake(self) -> RoutePlan:
        """A plan; while the model's pool sleeps, and nothing has gone wrong yet, the plan that there is once a worker is ready.

        Raises:
            Unavailable: nobody is ready, and it is not worth waiting.
            Overloaded: all who are ready are full, or too many requests wait for a pool to wake.
        """
        model = self._spec.model
        timeout_s = self._waking.timeout_s(model)
        if timeout_s <= 0 or self._trouble.num_failures or self._committed():
            return self._place()
        try:
            return self._place()
        except Unavailable:
            end_s = self._clock() + timeout_s
            with self._waking.hold(model):
                while self._clock() < end_s:
                    await self._view.wait(min(_MAX_PAUSE_S, max(0.0, end_s - self._clock())))
                    try:
                        return self._place()
                    except Unavailable as again:
                        error = again
                    await asyncio.sleep(_MIN_PAUSE_S)
            raise Unavailable(f"{error}, {timeout_s:g} s after it was asked for", retry_after_s=error.retry_after_s) from error

    def _place(self) -> RoutePlan:
        spec = self._spec
        token_ids = (*spec.prompt_token_ids, *self.progress.token_ids)
        plan = self._placement.place(
            spec.model,
            token_ids,
            salt=spec.cache_salt,
            tenant=spec.tenant,
            excluded=self._trouble.excluded,
            revision=self._revision,
        )
        self.progress.plans.append(plan)
        return plan

    async def _on_worker(self, plan: RoutePlan) -> AsyncGenerator[ChoiceDelta, None]:
        spec = self._spec
        request = Request(
            # Engines see ids of many gateways, and a lost worker may still be busy with an earlier try.
            request_id=RequestId(f"{spec.request_id}/{spec.index}/{secrets.token_hex(4)}"),
            prompt_token_ids=spec.prompt_token_ids,
            output_token_ids=tuple(self.progress.token_ids),
            sampling=spec.sampling,
            eos_token_ids=spec.eos_token_ids,
            priority=spec.priority,
            prefill_worker=plan.prefill_worker,
            traceparent=spec.traceparent,
            cache_salt=spec.cache_salt,
            tenant=spec.tenant,
        )
        prefill_worker = plan.prefill_worker
        self._placement.prefill_started(prefill_worker)
        left_s = spec.deadline_s - self._clock()
        try:
            connect_timeout_s = None if self._committed() else self._placement_timeout_s
            streaming = self._client.stream(plan.worker, request, deadline_left_s=left_s, connect_timeout_s=connect_timeout_s)
            async with aclosing(streaming) as answers:
                async for answer in answers:
                    if prefill_worker is not None and answer.output.new_token_ids:
                        self._placement.prefill_ended(prefill_worker)
                        prefill_worker = None
                    for output in _singly(answer.output) if spec.token_by_token else (answer.output,):
                        delta = self._take(output, plan)
                        yield delta
                        if delta.finish_reason is not None:
                            break  # a stop string: what came after it does not count
        finally:
            self._placement.prefill_ended(prefill_worker)

    def _take(self, output: RequestOutput, plan: RoutePlan) -> ChoiceDelta:
        progress = self.progress
        if output.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
            raise Unavailable(f"{plan.worker} ended the request without a reason")
        if self._revision is None and (info := self._placement.find(plan.worker)) is not None:
            self._revision = info.revision
        progress.num_cached_tokens = max(progress.num_cached_tokens, output.num_cached_tokens)
        progress.num_remote_tokens = max(progress.num_remote_tokens, output.num_remote_tokens)
        if output.times is not None:
            progress.queue_s = output.times.scheduled_s
        stop_token = output.stop_token_id is not None
        finish_reason = output.finish_reason
        progress.prompt_logprobs.update(output.prompt_logprobs)
        if self._spec.is_prompt_only:
            reason = None if finish_reason is None else FinishReason.LENGTH
            return ChoiceDelta(index=self._spec.index, finish_reason=reason, prompt_logprobs=self._prompt_logprobs(reason))
        if finish_reason is None:
            piece = self._text.feed(output.new_token_ids)
        else:
            piece = self._text.finish(output.new_token_ids, stop_token=stop_token, truncated=finish_reason is FinishReason.LENGTH)
        parts = piece.parts
        if self._text.stop_string is not None:
            if finish_reason is None:
                parts = merged([*parts, *self._text.end_by_stop()])
            finish_reason, stop_token = FinishReason.STOP, False
        token_ids = output.new_token_ids[: piece.num_tokens]
        progress.token_ids.extend(token_ids)
        progress.num_thought_tokens = self._text.num_thought_tokens
        named = stop_token and output.stop_token_id in self._spec.client_stop_token_ids
        return ChoiceDelta(
            index=self._spec.index,
            text=piece.text,
            parts=self._parts(parts),
            token_ids=token_ids,
            logprobs=tuple(self._logprob(logprob) for logprob in output.logprobs[: piece.num_tokens]),
            text_offsets=piece.offsets,
            finish_reason=finish_reason,
            stop_string=self._text.stop_string,
            stop_token_id=output.stop_token_id if named else None,
            prompt_logprobs=self._prompt_logprobs(finish_reason),
        )

    def _prompt_logprobs(self, finish_reason: FinishReason | None) -> tuple[Logprob, ...]:
        """One per token of the prompt, once: as soon as all are known, which is before its answer's first token."""
        found, ids = self.progress.prompt_logprobs, self._spec.prompt_token_ids
        if self._spec.sampling.num_prompt_logprobs is None or self._has_told_prompt:
            return ()
        if finish_reason is None and len(found) < len(ids) - 1:
            return ()
        self._has_told_prompt = True
        first = Logprob(chosen=self._probability(ids[0], 0.0), rank=0, top=(), is_first=True)
        return (first, *(self._logprob(found[position]) for position in range(1, len(ids)) if position in found))

    def _parts(self, parts: tuple[Part, ...]) -> tuple[Part, ...] | None:
        return None if self._spec.plan.parser is None else parts

    def _logprob(self, logprob: TokenLogprob) -> Logprob:
        return Logprob(
            chosen=self._probability(logprob.token_id, logprob.logprob),
            rank=logprob.rank,
            top=tuple(self._probability(token_id, value) for token_id, value in logprob.top),
        )

    def _probability(self, token_id: int, logprob: float) -> TokenProbability:
        token = self._text_model.token_text(token_id)
        return TokenProbability(token_id=token_id, text=token.text, raw=token.raw, logprob=logprob)

    def _note_failure(self, error: Unavailable | Overloaded, plan: RoutePlan | None) -> None:
        """Remember what went wrong. Raises when trying again is not worth it."""
        trouble = self._trouble
        trouble.num_failures += 1
        now_s = self._clock()
        first = trouble.since_s is None
        trouble.since_s = now_s if trouble.since_s is None else trouble.since_s
        if plan is None:
            trouble.excluded.clear()
            if first and not self._committed():
                raise error  # refuse early
        else:
            trouble.excluded.add(plan.worker)
            _log.warning("request %s, choice %d: %s", self._spec.request_id, self._spec.index, error)
        if isinstance(error, PeerLost):
            trouble.num_losses += 1
            self.progress.num_resumptions += 1
            if trouble.num_losses >= MAX_LOSSES:
                raise Unavailable(
                    f"{trouble.num_losses} workers were lost in a row with this request; the last: {error}"
                ) from error
        if self._committed():
            return
        if isinstance(error, Overloaded) and trouble.num_losses == 0 and trouble.num_failures >= 2:
            raise error
        if now_s - trouble.since_s > self._placement_timeout_s:
            raise error

    async def _pause(self) -> None:
        num_failures = self._trouble.num_failures
        if num_failures <= 1:
            return  # another worker may be there at once
        pause_s = min(_MAX_PAUSE_S, _MIN_PAUSE_S * 2 ** min(num_failures, 10))
        await self._view.wait(pause_s)
        await asyncio.sleep(_MIN_PAUSE_S)


def _singly(output: RequestOutput) -> Iterator[RequestOutput]:
    """An output's tokens one by one; how it ended comes with the last."""
    for position in range(len(output.new_token_ids) - 1):
        here = slice(position, position + 1)
        yield replace(
            output,
            new_token_ids=output.new_token_ids[here],
            logprobs=output.logprobs[here],
            finish_reason=None,
            error=None,
            stop_token_id=None,
        )
    last = max(0, len(output.new_token_ids) - 1)
    yield replace(output, new_token_ids=output.new_token_ids[last:], logprobs=output.logprobs[last:])
