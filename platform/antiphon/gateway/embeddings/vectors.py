"""Answers requests for vectors: tokenize, fan out over inputs, gather, count (request speed).

    texts ─► token ids ─► one engine request each, a bounded number at a time ─► vectors ─► embeddings, or scores

Equal prompts of one request are computed once. Must not know: HTTP or grpc.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from typing import TypeVar

from antiphon.core.budget import Use
from antiphon.core.errors import (
    AntiphonError,
    ContextLengthExceeded,
    DeadlineExceeded,
    InternalError,
    InvalidInput,
    Overloaded,
    UnknownModel,
)
from antiphon.core.request import Pooling
from antiphon.gateway.access.admission import Admission
from antiphon.gateway.config import GatewayConfig
from antiphon.gateway.embeddings.pairs import PairReader
from antiphon.gateway.embeddings.request import EmbeddingRequest, Embeddings, ScoreRequest, Scores, TextOrTokens, VectorCall
from antiphon.gateway.embeddings.runner import Progress, Vector, VectorRunner
from antiphon.gateway.metrics.instruments import GatewayMetrics
from antiphon.gateway.text.tokenizer import EncodedText, TextModel, in_thread
from antiphon.models.pooling.facts import PoolingFacts

_log = logging.getLogger(__name__)

_MAX_IN_FLIGHT = 64  # of one request, so that a long one leaves room in the workers' queues for others
_MAX_TOKENS = 2**20  # of a text, while no worker says what the model takes
_MAX_PAIR_TOKENS = 2**21  # of all pairs of one request: each has its query once more
_TURN_CHARS = 2**17  # tokenized in one go: others' texts have their turns between them
_EMBED = Pooling(kind="embed")

_Prompt = tuple[EncodedText, Pooling]
_T = TypeVar("_T")
_R = TypeVar("_R")


class VectorMaker:
    """Belongs to one event loop.

    Args:
        config: limits.
        models: tokenizers by the name clients send.
        facts: what each model is; None = it generates.
        runner: makes single vectors.
        limits: longest prompt and vocabulary of a model, None while no worker is registered.
        metrics: counts.
        executor: tokenizes.
        admission: lets requests in within their tenants' limits.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        config: GatewayConfig,
        *,
        models: Mapping[str, TextModel],
        facts: Mapping[str, PoolingFacts | None],
        runner: VectorRunner,
        limits: Callable[[str], tuple[int | None, int | None]],
        metrics: GatewayMetrics,
        executor: Executor,
        admission: Admission,
        clock: Callable[[], float],
    ) -> None:
        """Raises CheckpointInvalid where a ranking model has nothing to answer with."""
        self._config = config
        self._models = models
        self._facts = facts
        self._runner = runner
        self._limits = limits
        self._metrics = metrics
        self._executor = executor
        self._admission = admission
        self._clock = clock
        self._pairs = {
            name: PairReader.of(models[name], found)
            for name, found in facts.items()
            if found is not None and found.task == "rerank" and name in models
        }
        self.num_active = 0

    def task(self, model: str) -> str:
        """What a model is for."""
        facts = self._facts.get(model)
        return "generate" if facts is None else facts.task

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        """Vectors of the inputs.

        Raises:
            UnknownModel, InvalidInput, ContextLengthExceeded: it can't be done; the field is named.
            Overloaded, Unavailable, DeadlineExceeded, InternalError: not now, or not whole.
        """
        call = request.call
        facts = self._known(call.model)
        if facts.task != "embed":
            raise InvalidInput(f"the model {call.model!r} ranks pairs of texts, it has no embeddings: use /v1/rerank", "model")
        num_dims = _dimensions(facts, request.dimensions)
        prompts = [(text, _EMBED) for text in await self._encode(call, request.inputs, request.add_special_tokens, request.field)]
        vectors = await self._counted(call, prompts)
        return Embeddings(
            vectors=tuple(_cut(vector.values, num_dims, normalise=facts.normalise) for vector in vectors),
            num_prompt_tokens=sum(vector.num_tokens for vector in vectors),
        )

    async def score(self, request: ScoreRequest) -> Scores:
        """Scores of the pairs. Raises as ``embed``."""
        call = request.call
        facts = self._known(call.model)
        if facts.task == "embed":
            return await self._cosines(request)
        reader = self._pairs[call.model]
        if request.instruction is not None and not reader.asks:
            raise InvalidInput("this model judges by what it was trained for, and takes no instruction", "instruction")
        longest, _ = self._limits(call.model)
        cut = _cut_of(call, longest)

        text_model, instruction = self._models[call.model], request.instruction
        num_tokens = 0

        def encode(pair: tuple[str, str]) -> _Prompt:
            nonlocal num_tokens
            query, document = (_bounded(text_model, text, cut, longest) for text in pair)
            told = None if instruction is None else _bounded(text_model, instruction, cut, longest)
            encoded = reader.encode(query, document, told, cut)
            _check_length(encoded, longest, request.fields[1])
            num_tokens += len(encoded.token_ids)
            if num_tokens > _MAX_PAIR_TOKENS:
                more = f"the pairs have more than {_MAX_PAIR_TOKENS} tokens together; ask with fewer at once"
                raise InvalidInput(more, request.fields[1])
            return encoded, reader.pooling(encoded)

        more = len(instruction or "")
        prompts = await self._in_turns(request.pairs, lambda pair: len(pair[0]) + len(pair[1]) + more, encode)
        vectors = await self._counted(call, prompts)
        return Scores(
            values=tuple(_probability(vector.values) for vector in vectors),
            num_prompt_tokens=sum(vector.num_tokens for vector in vectors),
        )

    async def _cosines(self, request: ScoreRequest) -> Scores:
        if request.instruction is not None:
            raise InvalidInput("this model embeds, and takes no instruction; put it before the texts", "instruction")
        texts = list(dict.fromkeys(text for pair in request.pairs for text in pair))
        encoded = await self._encode(request.call, texts, add_special_tokens=True, field=request.fields[1])
        vectors = await self._counted(request.call, [(text, _EMBED) for text in encoded])
        found = dict(zip(texts, vectors, strict=True))
        return Scores(
            values=tuple(_cosine(found[a].values, found[b].values) for a, b in request.pairs),
            num_prompt_tokens=sum(vector.num_tokens for vector in vectors),
        )

    # ---- inside --------------------------------------------------------------------------------------------------

    def _known(self, model: str) -> PoolingFacts:
        if model not in self._models:
            raise UnknownModel(f"the model {model!r} does not exist", "model")
        facts = self._facts.get(model)
        if facts is None:
            raise InvalidInput(f"the model {model!r} generates text, it has neither embeddings nor scores", "model")
        return facts

    async def _encode(
        self, call: VectorCall, inputs: Sequence[TextOrTokens], add_special_tokens: bool, field: str = "input"
    ) -> list[EncodedText]:
        text_model = self._models[call.model]
        longest, vocab_size = self._limits(call.model)
        cut = _cut_of(call, longest)

        def encode(numbered: tuple[int, TextOrTokens]) -> EncodedText:
            index, item = numbered
            where = field if len(inputs) == 1 else f"{field}[{index}]"
            if isinstance(item, str):
                try:
                    text = _bounded(text_model, item, cut, longest)
                    encoded = text_model.encode_cut(text, cut, add_special_tokens=add_special_tokens)
                except InvalidInput as error:
                    raise type(error)(str(error), where) from error
            else:
                encoded = EncodedText(token_ids=item if cut is None else item[:cut])
                wrong = next((i for i in item if vocab_size is not None and not 0 <= i < vocab_size), None)
                if wrong is not None:
                    raise InvalidInput(f"token id {wrong} is not in the model's vocabulary of {vocab_size}", where)
            if not encoded.token_ids:
                raise InvalidInput("the input is empty: it has no tokens", where)
            _check_length(encoded, longest, where)
            return encoded

        return await self._in_turns(list(enumerate(inputs)), lambda numbered: len(numbered[1]), encode)

    async def _in_turns(self, items: Sequence[_T], size: Callable[[_T], int], work: Callable[[_T], _R]) -> list[_R]:
        """``work`` on each item, some at a time, so that a long request holds up nobody's short one."""
        found: list[_R] = []
        turn: list[_T] = []
        num_chars = 0

        def do() -> list[_R]:
            return [work(item) for item in turn]

        for item in items:
            turn.append(item)
            num_chars += size(item)
            if num_chars >= _TURN_CHARS:
                found += await in_thread(self._executor, num_chars, do)
                turn, num_chars = [], 0
        return [*found, *await in_thread(self._executor, num_chars, do)]

    async def _counted(self, call: VectorCall, prompts: Sequence[_Prompt]) -> list[Vector]:
        """The vectors, with everything around them that operators look at."""
        if self.num_active >= self._config.max_concurrent_requests:
            raise Overloaded(f"this gateway answers {self.num_active} requests already", retry_after_s=1.0)
        arrival_s = self._clock()
        asked_s = self._config.default_deadline_s if call.deadline_s is None else call.deadline_s
        left_s = min(asked_s, self._config.max_deadline_s)
        most = sum(len(text.token_ids) for text, _ in prompts)
        turn = await self._admission.enter(call.tenant, most, None)
        self.num_active += 1
        nothing = Use(
            tenant=call.tenant, model=call.model, num_requests=0, num_prompt_tokens=0, num_cached_tokens=0, num_output_tokens=0
        )
        try:
            async with asyncio.timeout(left_s):
                vectors = await self._all(call, prompts, arrival_s + left_s)
            num_cached = sum(vector.num_cached_tokens for vector in vectors)
            await turn.finish(replace(nothing, num_requests=1, num_prompt_tokens=most, num_cached_tokens=num_cached))
        except TimeoutError as error:
            raise DeadlineExceeded("the request's deadline has passed") from error
        except ExceptionGroup as group:
            raise _first(group) from group
        finally:
            turn.leave(nothing)
            self.num_active -= 1
        seconds = self._clock() - arrival_s
        num_tokens = sum(vector.num_tokens for vector in vectors)
        self._metrics.request_finished(call.model, seconds, num_tokens, sum(vector.num_cached_tokens for vector in vectors))
        extra = {
            "request_id": call.request_id,
            "model": call.model,
            "num_prompt_tokens": num_tokens,
            "finished_s": round(seconds, 4),
        }
        _log.info("request finished", extra=extra)
        return vectors

    async def _all(self, call: VectorCall, prompts: Sequence[_Prompt], deadline_s: float) -> list[Vector]:
        room = asyncio.Semaphore(_MAX_IN_FLIGHT)
        progress = Progress()

        async def one(prompt: _Prompt) -> Vector:
            encoded, pooling = prompt
            async with room:
                return await self._runner.run(call, encoded.token_ids, pooling, deadline_s, progress)

        async with asyncio.TaskGroup() as group:
            tasks = {prompt: group.create_task(one(prompt)) for prompt in dict.fromkeys(prompts)}
        return [tasks[prompt].result() for prompt in prompts]


def _first(group: ExceptionGroup[Exception]) -> AntiphonError:
    """The error that a client is told of several."""
    for error in group.exceptions:
        if isinstance(error, AntiphonError):
            return error
        if isinstance(error, ExceptionGroup):
            return _first(error)
    return InternalError(f"{type(group.exceptions[0]).__name__}: {group.exceptions[0]}")


def _cut_of(call: VectorCall, longest: int | None) -> int | None:
    """Tokens that texts are cut to; None = they are whole."""
    if call.truncate_tokens is None or call.truncate_tokens >= 0:
        return call.truncate_tokens
    return longest


def _bounded(text_model: TextModel, text: str, cut: int | None, longest: int | None) -> str:
    """A text that is worth to be tokenized whole. Raises InvalidInput."""
    if cut is not None:
        return text_model.beginning(text, cut)
    text_model.refuse_longer(text, longest or _MAX_TOKENS)
    return text


def _check_length(encoded: EncodedText, longest: int | None, field: str) -> None:
    if longest is not None and len(encoded.token_ids) > longest:
        raise ContextLengthExceeded(
            f"the model takes {longest} tokens, here are {len(encoded.token_ids)}; truncate_prompt_tokens -1 cuts what is longer",
            field,
        )


def _dimensions(facts: PoolingFacts, asked: int | None) -> int | None:
    """Numbers that an embedding is cut to; None = it is whole. Raises InvalidInput."""
    if asked is None or asked == facts.num_dims:
        return None
    if facts.shorter_dims is None:
        raise InvalidInput(f"this model's embeddings have {facts.num_dims} dimensions and can't be cut", "dimensions")
    if asked > facts.num_dims or (facts.shorter_dims and asked not in facts.shorter_dims):
        known = ", ".join(map(str, facts.shorter_dims)) or f"1 to {facts.num_dims}"
        raise InvalidInput(f"dimensions: {asked}, this model has {known}", "dimensions")
    return asked


def _cut(values: tuple[float, ...], num_dims: int | None, *, normalise: bool) -> tuple[float, ...]:
    if num_dims is None:
        return values
    cut = values[:num_dims]
    length = math.sqrt(math.fsum(value * value for value in cut)) if normalise else 1.0
    return tuple(value / length for value in cut) if length > 0 else cut


def _cosine(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    lengths = math.sqrt(math.fsum(x * x for x in a)) * math.sqrt(math.fsum(y * y for y in b))
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / lengths if lengths > 0 else 0.0


def _probability(logits: tuple[float, ...]) -> float:
    """Of yes: of one logit, or of two, no and yes."""
    logit = logits[0] if len(logits) == 1 else logits[1] - logits[0]
    return 1.0 / (1.0 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1.0 + math.exp(logit))
