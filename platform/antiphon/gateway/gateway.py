"""What both doors share: the generator, the models, the status, whether it drains (request speed).

Must not know: HTTP or grpc.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

from antiphon import __version__
from antiphon.core.budget import Budgets
from antiphon.core.errors import AntiphonError, InternalError, InvalidInput, Unavailable, UnknownModel
from antiphon.directory.budgets import MemoryBudgets
from antiphon.directory.workers import WorkerSource, WorkerView
from antiphon.gateway.access.admission import Admission
from antiphon.gateway.access.key_file import KeyFile
from antiphon.gateway.access.keys import ApiKeys, cache_salt
from antiphon.gateway.compositions import ServedComposition
from antiphon.gateway.config import GatewayConfig
from antiphon.gateway.embeddings.runner import VectorRunner
from antiphon.gateway.embeddings.vectors import VectorMaker
from antiphon.gateway.generation.generator import Generator
from antiphon.gateway.generation.preparing import Preparer
from antiphon.gateway.generation.request import Event, GenerationRequest, Prompt
from antiphon.gateway.http.bodies import Bodies
from antiphon.gateway.metrics.instruments import GatewayMetrics
from antiphon.gateway.metrics.throughput import tell
from antiphon.gateway.routing.engine_client import EngineClient
from antiphon.gateway.routing.placement import Placement
from antiphon.gateway.routing.waking import Waking
from antiphon.gateway.status import Status, pools_of, revisions_of, workers_of
from antiphon.gateway.text.chat_options import ChatOptions
from antiphon.gateway.text.dialect import Dialect, TextFormats
from antiphon.gateway.text.templates.template_process import TemplateProcess
from antiphon.gateway.text.tokenizer import TextModel
from antiphon.models.pooling.facts import PoolingFacts
from antiphon.telemetry import Telemetry
from antiphon.worker.structure.checking import GrammarChecker

if TYPE_CHECKING:
    from antiphon.gateway.web.openapi import Operation

_log = logging.getLogger(__name__)

_LAST_ACCOUNTS_S = 2.0  # for what tenants used to be written, at the end


class Gateway:
    """One gateway process. Belongs to one event loop; ``close`` is idempotent.

    Args:
        config: limits and addresses.
        models: tokenizers by the name clients send.
        source: where workers are registered.
        telemetry: traces and metrics.
        pooling: what the models are that don't generate; None or absent = it does.
        budgets: where tenants' limits are kept; None = this gateway keeps them alone.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        config: GatewayConfig,
        *,
        models: Mapping[str, TextModel],
        source: WorkerSource,
        telemetry: Telemetry,
        pooling: Mapping[str, PoolingFacts | None] | None = None,
        budgets: Budgets | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        file = config.api_keys_file
        self.keys = ApiKeys(config.api_keys, None if file is None else KeyFile(file))
        self.admission = Admission(MemoryBudgets(clock) if budgets is None else budgets, self.keys.limits, telemetry)
        self.bodies = Bodies()
        self.models = models
        self.compositions: Mapping[str, ServedComposition] = {}  # by metadata.name; set once, before the doors open
        self.published: Sequence[Operation] = ()  # what doors in front of this one add to /openapi.json; set with them
        self.created = int(time.time())
        self.draining = False
        self.telemetry = telemetry
        self._client = EngineClient(clock=clock)
        self.view = WorkerView(source, refresh_s=config.refresh_s, clock=clock, answers=self._client.answers)
        self._clock = clock
        self._started_s = clock()
        # Placement notes what is in flight before new connections are made or old ones dropped.
        self._placement = placement = Placement(
            self.view,
            self._client,
            remote_prefill_min_tokens=config.remote_prefill_min_tokens,
            by_model=config.remote_prefill_min_tokens_by_model,
        )
        self.view.on_refresh(self._client.sync)
        self.dialects = {name: Dialect(model, config.formats.get(name, TextFormats())) for name, model in models.items()}
        self._checker = GrammarChecker()
        self._executor = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenize")
        self.templates = TemplateProcess(
            {
                name: (model.chat_template.source, model.chat_template.special_tokens)
                for name, model in models.items()
                if model.chat_template is not None
            }
        )
        self._preparer = Preparer(models, self.dialects, self._executor, self._checker, self.templates)
        waking = Waking(config.wake_timeout_s_by_model)
        metrics = GatewayMetrics(
            telemetry, workers=lambda: self.view.workers, num_requests=lambda: self.num_requests, held=lambda: waking.held
        )
        self._vectors = VectorMaker(
            config,
            models=models,
            facts={} if pooling is None else pooling,
            runner=VectorRunner(placement, self._client, waking, clock, config.placement_timeout_s),
            limits=self.limits,
            metrics=metrics,
            executor=self._executor,
            admission=self.admission,
            clock=clock,
        )
        self._generating = frozenset(name for name in models if self._vectors.task(name) == "generate")
        self._generator = Generator(
            config,
            models=models,
            view=self.view,
            client=self._client,
            placement=placement,
            metrics=metrics,
            tracer=telemetry.tracer(__name__),
            preparer=self._preparer,
            admission=self.admission,
            waking=waking,
            clock=clock,
        )

    def start(self) -> None:
        """Begin what is better begun before the first request. On the event loop."""
        if self.config.checks_ahead:
            self._checker.start()

    @property
    def num_requests(self) -> int:
        """Requests being answered."""
        return self._generator.num_active + self._vectors.num_active

    def for_tenant(self, request: GenerationRequest, tenant: str) -> GenerationRequest:
        """The request with the prefix cache that its tenant may see: what one has sent, another can't find out by asking."""
        if request.model in self.config.shared_cache_models:
            return replace(request, tenant=tenant)
        return replace(request, tenant=tenant, cache_salt=cache_salt(tenant, request.cache_salt))

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """See ``Generator.generate``."""
        try:
            if self.draining:
                raise Unavailable("this gateway is shutting down", retry_after_s=1.0)
            self.check_generates(request.model)
        except AntiphonError as error:
            self.refused(error, request.model)
            raise
        return self._generator.generate(request)

    def check_generates(self, model: str) -> None:
        """Refuse a model that is there for vectors. Raises InvalidInput."""
        task = self._vectors.task(model)
        if task != "generate":
            does = "embeds texts: use /v1/embeddings" if task == "embed" else "ranks pairs of texts: use /v1/rerank or /v1/score"
            raise InvalidInput(f"the model {model!r} does not generate, it {does}", "model")

    def task(self, model: str) -> str:
        """What a model is for: generate, embed or rerank."""
        return self._vectors.task(model)

    def vectors(self) -> VectorMaker:
        """What answers with vectors. Raises Unavailable while draining."""
        if self.draining:
            raise Unavailable("this gateway is shutting down", retry_after_s=1.0)
        return self._vectors

    def limits(self, model: str) -> tuple[int | None, int | None]:
        """The model's longest prompt and vocabulary, as its workers have them; None while none is registered."""
        infos = [info for info in self.view.workers if info.model == model and info.role.generates]
        lengths = [info.max_model_len for info in infos if info.max_model_len > 0]
        vocab_sizes = [info.vocab_size for info in infos if info.vocab_size > 0]
        return min(lengths, default=None), min(vocab_sizes, default=None)

    def admit(self, authorization: str | None) -> str:
        """The tenant of an Authorization header that comes to use a model or its tokenizer. Called before its body is read.

        Raises:
            Unauthenticated: its key is none of ours.
            RateLimited: the key has no request left in this minute.
        """
        tenant = self.keys.check(authorization)
        self.admission.check_early(tenant)
        return tenant

    def check_room(self, tenant: str) -> None:
        """Refuse a request to generate of which nothing is known but its tenant, where it would be refused whatever it asks.

        Raises:
            Overloaded: no worker of any model would take it.
        """
        self._generator.check_room()
        if not self.compositions:  # experts elsewhere have queues of their own
            self._placement.check_room(self._generating, tenant)

    def knocked(self, authorization: str | None) -> None:
        """Refuse a key before a call's message is there. Raises Unauthenticated."""
        try:
            self.keys.check(authorization)
        except AntiphonError as error:
            self.refused(error)
            raise

    def refused(self, error: Exception, model: object = None) -> None:
        """Count what a door refused by itself; ``model`` as the client sent it."""
        known = error if isinstance(error, AntiphonError) else InternalError(type(error).__name__)
        self._generator.refused(model if isinstance(model, str) else "", known)

    def refused_unread(self, code: str) -> None:
        """Count what was refused before a route saw it, by its code."""
        self._generator.refused_as("", code)

    async def tell(self) -> None:
        """Log what is done, now and then, for ever."""
        await tell(lambda: replace(self._generator.totals), lambda: self.num_requests, lambda: self.view.workers)

    def end_all(self) -> None:
        """The time to drain is over: requests that are still answered end with an error, not with a closed connection."""
        self._generator.end_all(Unavailable("this gateway is shutting down", retry_after_s=1.0))

    async def prompt_ids(self, model: str, prompt: Prompt, options: ChatOptions) -> tuple[int, ...]:
        """Token ids of a prompt, as a request with it would have them.

        Raises:
            UnknownModel: no such model is served here.
            InvalidInput: the model can't take it.
        """
        return await self._preparer.token_ids(model, prompt, options, self.max_model_len(model))

    async def text_ids(self, model: str, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of a text by itself. Raises as ``prompt_ids``."""
        return await self._preparer.text_ids(model, text, self.max_model_len(model), add_special_tokens=add_special_tokens)

    async def text_of(self, model: str, token_ids: Sequence[int]) -> str:
        """The text of token ids, special ones shown.

        Raises:
            UnknownModel: there is no such model.
            InvalidInput: an id is none of its tokens'.
        """
        self._check_known(model)
        _, vocab_size = self.limits(model)
        wrong = None if vocab_size is None else next((token_id for token_id in token_ids if token_id >= vocab_size), None)
        if wrong is not None:
            raise InvalidInput(f"tokens: {wrong} is not in the model's vocabulary of {vocab_size}", "tokens")
        return await self._preparer.text_of(model, token_ids)

    async def texts_of(self, model: str, token_ids: Sequence[int]) -> list[str]:
        """The text of each token by itself. Raises UnknownModel."""
        self._check_known(model)
        return await self._preparer.texts_of(model, token_ids)

    def _check_known(self, model: str) -> None:
        if model not in self.models:
            raise UnknownModel(f"the model {model!r} does not exist", "model")

    def max_model_len(self, model: str) -> int | None:
        """Longest prompt plus output; None while no worker of it is registered.

        Raises:
            UnknownModel: no such model is served here.
        """
        self._check_known(model)
        lengths = [i.max_model_len for i in self.view.workers if i.model == model and i.role.generates and i.max_model_len > 0]
        return min(lengths, default=None)

    def revision(self, model: str) -> str:
        """The revision of a ready worker of the model, or ""."""
        return next((i.revision for i in self.view.workers if i.model == model and i.role.generates and i.ready), "")

    def is_ready(self, model: str) -> bool:
        """True when a worker can take requests for the model now."""
        return any(info.model == model and info.role.generates and info.ready and not info.draining for info in self.view.workers)

    @property
    def num_ready_workers(self) -> int:
        """Workers of any role that this gateway knows to be ready."""
        return sum(info.ready and not info.draining for info in self.view.workers)

    def why_not_ready(self) -> str | None:
        """Why this gateway should get no traffic; None when it should."""
        if self.draining:
            return "shutting down"
        if self.view.age_s is None:
            return "the directory has not answered yet"
        if any(composition.status().state != "unavailable" for composition in self.compositions.values()):
            return None  # external experts need no worker of ours
        if not any(self.is_ready(model) for model in self.models):
            return "no model has a ready worker"
        return None

    def revisions(self) -> dict[str, dict[str, int]]:
        """See ``revisions_of``: of the workers that this gateway's requests may reach."""
        return revisions_of([info for info in self.view.workers if info.model in self.models])

    def status(self, deployment: str = "") -> Status:
        """What this gateway sees, of one deployment or of all ("")."""
        records = [r for r in self.view.records if not deployment or r.info.deployment == deployment]
        return Status(
            version=__version__,
            uptime_s=self._clock() - self._started_s,
            num_requests=self.num_requests,
            draining=self.draining,
            pools=pools_of([record.info for record in records]),
            workers=workers_of(
                records,
                age_s=self.view.age_s or 0.0,
                is_connected=self._client.is_connected,
                inflight_on=self._client.inflight_on,
            ),
            compositions=tuple(composition.status() for composition in self.compositions.values()),
        )

    async def close(self) -> None:
        """End the sessions with all workers."""
        await self._client.close()
        try:
            async with asyncio.timeout(_LAST_ACCOUNTS_S):
                await self.admission.flush()
        except (AntiphonError, TimeoutError) as error:
            _log.warning("the last second of the tenants' accounts is not written: %s", error)
        await self.templates.close()
        await self._checker.close()
        self._executor.shutdown(wait=False, cancel_futures=True)
