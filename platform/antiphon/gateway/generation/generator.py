"""Answers a GenerationRequest: tokenize, fan out over choices, merge, count, trace (request speed).

    prompts ─► token ids ─► ChoiceRun per choice (tasks) ─► one queue ─► Started, ChoiceDelta ..., Completed

Started comes with the first thing a worker says, so that whatever fails before can still be answered with a status of its own.
Closing the generator, or the deadline, aborts every choice at its engine.

Must not know: HTTP or grpc.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from antiphon.core.budget import Use
from antiphon.core.errors import (
    AntiphonError,
    Cancelled,
    DeadlineExceeded,
    InternalError,
    Overloaded,
    UnknownModel,
)
from antiphon.directory.workers import WorkerView
from antiphon.gateway.access.admission import Admission
from antiphon.gateway.config import GatewayConfig
from antiphon.gateway.generation.choice_run import ChoiceRun, ChoiceSpec
from antiphon.gateway.generation.preparing import Preparer, check_ids, prompt_text
from antiphon.gateway.generation.request import (
    ChoiceDelta,
    Completed,
    Event,
    GenerationRequest,
    Started,
    Usage,
)
from antiphon.gateway.generation.span import RequestSpan, captures_content
from antiphon.gateway.metrics.instruments import GatewayMetrics
from antiphon.gateway.metrics.throughput import Totals
from antiphon.gateway.routing.engine_client import EngineClient
from antiphon.gateway.routing.placement import Placement
from antiphon.gateway.routing.waking import Waking
from antiphon.gateway.text.tokenizer import TextModel
from antiphon.telemetry import Tracer, log_context

_log = logging.getLogger(__name__)


_Item = ChoiceDelta | AntiphonError


@dataclass(slots=True)
class _Job:
    """One request while it is answered."""

    request: GenerationRequest
    arrival_s: float
    deadline_s: float
    prompts: tuple[tuple[int, ...], ...]
    max_tokens: tuple[int, ...]  # of each prompt's choices
    runs: list[ChoiceRun]
    seed: int
    committed: bool = False
    first_token_s: float | None = None
    last_token_s: dict[int, float] = field(default_factory=dict)

    @property
    def most_tokens(self) -> int:
        """What it may take of a budget: prompts, and all the output that may come of them."""
        n = self.request.n
        return sum(n * max(0, most) + len(ids) for ids, most in zip(self.prompts, self.max_tokens, strict=True))

    @property
    def use(self) -> Use:
        """What it took so far; tokens that the client brought with it were another request's."""
        progress = [run.progress for run in self.runs]
        brought = sum(len(ids) for ids in self.request.resume.values())
        return Use(
            tenant=self.request.tenant,
            model=self.request.model,
            num_requests=int(self.committed),
            num_prompt_tokens=sum(len(ids) for ids in self.prompts) if self.committed else 0,
            num_cached_tokens=sum(each.num_cached_tokens for each in progress[:: self.request.n]),
            num_output_tokens=max(0, sum(len(each.token_ids) for each in progress) - brought),
        )


class Generator:
    """Answers requests. Belongs to one event loop.

    Args:
        config: limits.
        models: tokenizers by the name clients send.
        view: registered workers.
        client: sessions to them.
        placement: chooses among them.
        metrics: counts.
        tracer: one span per request.
        preparer: makes prompts and plans of them.
        admission: lets requests in within their tenants' limits.
        waking: holds requests of pools that sleep.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        config: GatewayConfig,
        *,
        models: Mapping[str, TextModel],
        view: WorkerView,
        client: EngineClient,
        placement: Placement,
        metrics: GatewayMetrics,
        tracer: Tracer,
        preparer: Preparer,
        admission: Admission,
        waking: Waking,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._models = models
        self._view = view
        self._client = client
        self._placement = placement
        self._metrics = metrics
        self._tracer = tracer
        self._preparer = preparer
        self._admission = admission
        self._with_content = captures_content()
        self._clock = clock
        self._waking = waking
        self.totals = Totals()
        self._open: set[asyncio.Queue[_Item]] = set()
        self.num_active = 0

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """The answer.

        Raises:
            UnknownModel, InvalidInput, ContextLengthExceeded, Overloaded, Unavailable: before anything else was yielded.
            DeadlineExceeded, Unavailable, InternalError: at any time.
        """
        self.check_room()
        request = self._with_defaults(request)
        arrival_s = self._clock()
        self.num_active += 1
        span = RequestSpan(self._tracer, request, with_content=self._with_content)
        try:
            job = await self._prepare(request, arrival_s, span)
            turn = await self._admission.enter(request.tenant, job.most_tokens, request.max_tokens_field)
            try:
                async for event in self._answer(job):
                    span.event(event)
                    if isinstance(event, Completed):
                        await turn.finish(job.use)
                    yield event
            finally:
                turn.leave(job.use)
                span.routed(job.runs)
        except AntiphonError as error:
            self._failed(request, error, span)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            self._failed(request, Cancelled("the client left"), span)
            raise
        finally:
            self.num_active -= 1
            span.end()

    def check_room(self) -> None:
        """Refuse one more request than this gateway answers at once. Raises Overloaded."""
        if self.num_active >= self._config.max_concurrent_requests:
            raise Overloaded(f"this gateway answers {self.num_active} requests already", retry_after_s=1.0)

    def end_all(self, error: AntiphonError) -> None:
        """Answer every request that is under way with an error: nothing more is done for it."""
        for items in self._open:
            items.put_nowait(error)

    def _with_defaults(self, request: GenerationRequest) -> GenerationRequest:
        model = self._models.get(request.model)
        if model is None or not model.sampling_defaults or request.model in self._config.plain_sampling_models:
            return request
        return replace(request, sampling=request.sampling.with_defaults(model.sampling_defaults))

    def _failed(self, request: GenerationRequest, error: AntiphonError, span: RequestSpan) -> None:
        self.totals.num_failed += 1
        self._metrics.request_failed(self._known(request.model), error.code)
        span.failed(error)
        level = logging.ERROR if isinstance(error, InternalError) else logging.INFO
        # What a client is told of its own mistake quotes it: that is for the client alone.
        said: object = f"{error.code} {getattr(error, 'field', None) or ''}".strip() if error.http_status < 500 else error
        _log.log(level, "request failed: %s", said, extra={"request_id": request.request_id, "code": error.code})

    def refused(self, model: str, error: AntiphonError) -> None:
        """A door refused a request before it came here."""
        self.refused_as(model, error.code)

    def refused_as(self, model: str, code: str) -> None:
        """The same, where all that is known is the error's code."""
        self.totals.num_failed += 1
        self._metrics.request_failed(self._known(model), code)

    def _known(self, model: str) -> str:
        """Names that clients make up don't become labels."""
        return model if model in self._models else "unknown"

    # ---- before a worker is asked --------------------------------------------------------------------------------

    async def _prepare(self, request: GenerationRequest, arrival_s: float, span: RequestSpan) -> _Job:
        text_model = self._models.get(request.model)
        if text_model is None:
            raise UnknownModel(f"the model {request.model!r} does not exist", "model")
        asked_s = self._config.default_deadline_s if request.deadline_s is None else request.deadline_s
        left_s = min(asked_s, self._config.max_deadline_s)
        if left_s <= 0:
            raise DeadlineExceeded("the deadline has passed already")
        max_model_len, vocab_size = self._limits(request.model)
        prepared = await self._preparer.prepare(request, max_model_len)
        prompts = [each.token_ids for each in prepared]
        check_ids(request, prompts, vocab_size)
        max_tokens = [each.max_tokens for each in prepared]
        seed = request.sampling.seed if request.sampling.seed is not None else secrets.randbits(63)
        deadline_s = arrival_s + left_s
        job = _Job(
            request=request,
            arrival_s=arrival_s,
            deadline_s=deadline_s,
            prompts=tuple(prompts),
            max_tokens=tuple(max_tokens),
            runs=[],
            seed=seed,
        )
        for index in range(len(prompts) * request.n):
            which = index // request.n
            spec = ChoiceSpec(
                index=index,
                request_id=request.request_id,
                model=request.model,
                prompt_token_ids=prompts[which],
                sampling=request.sampling.resolve(
                    max_tokens=max(1, max_tokens[which]), seed=seed + index, rules=prepared[which].rules
                ),
                eos_token_ids=text_model.eos_token_ids | prepared[which].end_ids,
                client_stop_token_ids=request.sampling.stop_token_ids,
                stops=request.stop,
                include_stop=request.include_stop,
                skip_special_tokens=request.skip_special_tokens,
                deadline_s=deadline_s,
                priority=request.priority,
                cache_salt=request.cache_salt,
                tenant=request.tenant,
                traceparent=span.traceparent,
                resume=request.resume.get(index, ()),
                token_by_token=request.token_by_token,
                plan=prepared[which].plan,
                is_prompt_only=max_tokens[which] == 0,
            )
            job.runs.append(
                ChoiceRun(
                    spec,
                    text_model=text_model,
                    placement=self._placement,
                    client=self._client,
                    view=self._view,
                    committed=lambda: job.committed,
                    clock=self._clock,
                    waking=self._waking,
                    placement_timeout_s=(
                        self._config.placement_timeout_s if request.placement_timeout_s is None else request.placement_timeout_s
                    ),
                )
            )
        return job

    def _limits(self, model: str) -> tuple[int | None, int | None]:
        """The model's context and vocabulary, in tokens, as its workers have it; None while none is registered."""
        infos = [info for info in self._view.workers if info.model == model and info.role.generates]
        lengths = [info.max_model_len for info in infos if info.max_model_len > 0]
        vocab_sizes = [info.vocab_size for info in infos if info.vocab_size > 0]
        return min(lengths, default=None), min(vocab_sizes, default=None)

    # ---- while workers answer ------------------------------------------------------------------------------------

    async def _answer(self, job: _Job) -> AsyncGenerator[Event, None]:
        request = job.request
        items: asyncio.Queue[_Item] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        late = DeadlineExceeded("the request's deadline has passed")
        timer = loop.call_later(max(0.0, job.deadline_s - self._clock()), items.put_nowait, late)
        self._open.add(items)
        tasks = [asyncio.create_task(_feed(run, items, request.request_id)) for run in job.runs]
        num_open = len(tasks)
        try:
            while num_open:
                item = await items.get()
                if isinstance(item, AntiphonError):
                    raise item
                if not job.committed:
                    job.committed = True
                    yield self._started(job)
                self._count(job, item)
                if item.finish_reason is not None:
                    num_open -= 1
                yield item
            yield Completed(usage=self._usage(job))
        finally:
            timer.cancel()
            self._open.discard(items)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for run in job.runs:
                for _ in range(run.progress.num_resumptions):
                    self._metrics.resumed(request.model)

    def _started(self, job: _Job) -> Started:
        text_model = self._models[job.request.model]
        return Started(
            request_id=job.request.request_id,
            model=job.request.model,
            seed=job.seed,
            num_prompt_tokens=sum(len(ids) for ids in job.prompts),
            created=int(time.time()),
            prompt_texts=tuple(prompt_text(text_model, p, ids) for p, ids in zip(job.request.prompts, job.prompts, strict=True)),
        )

    def _count(self, job: _Job, delta: ChoiceDelta) -> None:
        model = job.request.model
        num_tokens = len(delta.token_ids)
        if num_tokens:
            now_s = self._clock()
            self._metrics.generated(model, num_tokens)
            self.totals.num_generation_tokens += num_tokens
            if job.first_token_s is None:
                job.first_token_s = now_s - job.arrival_s
                self._metrics.first_token(model, job.first_token_s)
            before_s = job.last_token_s.get(delta.index)
            if before_s is not None:
                self._metrics.tokens(model, num_tokens, now_s - before_s)
            job.last_token_s[delta.index] = now_s
        if delta.finish_reason is not None:
            self._metrics.choice_finished(model, delta.finish_reason.value, job.runs[delta.index].progress.queue_s)

    def _usage(self, job: _Job) -> Usage:
        finished_s = self._clock() - job.arrival_s
        progress = [run.progress for run in job.runs]
        # A prompt's first choice says what was cached before this request; its siblings find what the first one left.
        first_of_prompt = progress[:: job.request.n]
        usage = Usage(
            num_prompt_tokens=sum(len(ids) for ids in job.prompts),
            num_completion_tokens=sum(len(p.token_ids) for p in progress),
            num_cached_tokens=sum(p.num_cached_tokens for p in first_of_prompt),
            num_remote_tokens=sum(p.num_remote_tokens for p in first_of_prompt),
            num_resumptions=sum(p.num_resumptions for p in progress),
            num_thought_tokens=sum(p.num_thought_tokens for p in progress),
            first_token_s=finished_s if job.first_token_s is None else job.first_token_s,
            finished_s=finished_s,
        )
        self.totals.num_requests += 1
        self.totals.num_prompt_tokens += usage.num_prompt_tokens
        self._metrics.request_finished(job.request.model, finished_s, usage.num_prompt_tokens, usage.num_cached_tokens)
        _log.info(
            "request finished",
            extra={
                "request_id": job.request.request_id,
                "model": job.request.model,
                "num_prompt_tokens": usage.num_prompt_tokens,
                "num_completion_tokens": usage.num_completion_tokens,
                "first_token_s": round(usage.first_token_s, 4),
                "finished_s": round(usage.finished_s, 4),
            },
        )
        return usage


async def _feed(run: ChoiceRun, items: asyncio.Queue[_Item], request_id: str) -> None:
    """A choice's task: everything it has to say, also how it failed, goes into the queue."""
    try:
        with log_context(request_id=request_id):
            async with aclosing(run.deltas()) as deltas:
                async for delta in deltas:
                    items.put_nowait(delta)
    except AntiphonError as error:
        items.put_nowait(error)
    except Exception as error:  # noqa: BLE001 - a background task: its owner raises what it stores
        _log.exception("a choice failed")
        items.put_nowait(InternalError(f"{type(error).__name__}: {error}"))
