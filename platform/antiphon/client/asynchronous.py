"""The asyncio client (request speed). Belongs to one event loop; any number of its tasks may use it.

Must not know: how messages look, or when to try again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import TypeVar, Unpack

from antiphon.client.retry import Attempts, RetryPolicy
from antiphon.client.settings import DEFAULT_ENDPOINT, UNARY_TIMEOUT_S, Settings
from antiphon.client.status_values import ServiceStatus
from antiphon.client.stream_state import StreamState
from antiphon.client.values import Chunk, Completion, Embeddings, ModelInfo, Scores, Usage
from antiphon.client.vectors import EmbedOptions, ScoreOptions, embed_request, embeddings_of, score_request, scores_of
from antiphon.client.wire import GenerateOptions, generate_request, models_of, status_of
from antiphon.core.errors import AntiphonError, Cancelled
from antiphon.rpc.client_channel import AsyncInferenceCalls, AsyncResponseStream, Tls
from antiphon.rpc.v1 import inference_pb2 as pb

T = TypeVar("T")
Start = Callable[[pb.GenerateRequest, float], AsyncResponseStream]


class AsyncStream:
    """An answer as it comes: iterate for its chunks. Closing it before its end cancels the request on the server.

        async with client.stream("m", prompt="Hello") as stream:
            async for chunk in stream:
                print(chunk.text, end="")

    One task iterates; any task of the loop may close. Cancelling the iterating task cancels the request too.
    """

    def __init__(self, start: Start, request: pb.GenerateRequest, attempts: Attempts) -> None:
        self._start = start
        self._state = StreamState(request, attempts)
        self._call: AsyncResponseStream | None = None
        self._closed = asyncio.Event()

    @property
    def request_id(self) -> str:
        """The request's id; empty until the server has said it."""
        return self._state.request_id

    @property
    def routed(self) -> Mapping[str, str]:
        """What a composition says of its answer (x-antiphon-expert, -category, -confidence, -reason, -decision-id), once a
        chunk has come; empty for other models.
        """
        return self._state.routed

    @property
    def usage(self) -> Usage | None:
        """Tokens and times; None until the end."""
        return self._state.usage

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> Chunk:
        while not self._state.ended:
            try:
                chunk = await self._receive()
            except AntiphonError as error:
                self._drop_call()
                if self._closed.is_set():
                    raise Cancelled("the stream is closed") from error
                await self._pause(self._state.pause_after(error))
                continue
            if chunk is not None:
                return chunk
        raise StopAsyncIteration

    async def completion(self) -> Completion:
        """Read to the end and return the whole answer; after ``close``, what had come by then."""
        async for _ in self:
            pass
        return self._state.completion()

    async def close(self) -> None:
        """Cancel the request unless it has ended. Idempotent."""
        self._closed.set()
        if not self._state.ended:
            self._state.ended = True
            self._drop_call()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def _receive(self) -> Chunk | None:
        if self._call is None:
            self._call = self._start(self._state.request, self._state.attempts.timeout_s())
        response = await self._call.receive()
        if response is not None and self._state.wants_routed:
            self._state.note_routed(await self._call.routed())
        return self._state.feed(response)

    async def _pause(self, pause_s: float) -> None:
        try:
            async with asyncio.timeout(pause_s):
                await self._closed.wait()
        except TimeoutError:
            return

    def _drop_call(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            call.cancel()


class AsyncClient:
    """An asyncio client of one endpoint; ``Client``'s twin, with the same arguments and errors."""

    def __init__(
        self,
        endpoint: str = DEFAULT_ENDPOINT,
        *,
        api_key: str | None = None,
        tls: Tls | None = None,
        timeout_s: float = 600.0,
        retry: RetryPolicy | None = None,
    ) -> None:
        self._settings = Settings(
            endpoint=endpoint, api_key=api_key, tls=tls, timeout_s=timeout_s, retry=RetryPolicy() if retry is None else retry
        )
        self._calls = AsyncInferenceCalls(endpoint, tls)

    async def generate(self, model: str, **options: Unpack[GenerateOptions]) -> Completion:
        """The whole answer; ``GenerateOptions`` lists what may be asked."""
        async with self.stream(model, **options) as stream:
            return await stream.completion()

    def stream(self, model: str, **options: Unpack[GenerateOptions]) -> AsyncStream:
        """The answer as it comes; ``GenerateOptions`` lists what may be asked."""
        request = generate_request(model, options)
        metadata = self._settings.metadata(options)

        def start(request: pb.GenerateRequest, timeout_s: float) -> AsyncResponseStream:
            return self._calls.generate(request, timeout_s=timeout_s, metadata=metadata)

        return AsyncStream(start, request, Attempts(self._settings.retry, self._settings.timeout_of(options)))

    async def embed(self, model: str, **options: Unpack[EmbedOptions]) -> Embeddings:
        """Vectors of texts or token ids, of a model that embeds; ``EmbedOptions`` lists what may be asked."""
        request, timeout_s = embed_request(model, options)
        metadata = self._settings.metadata()
        timeout_s = self._settings.timeout_s if timeout_s is None else timeout_s
        return embeddings_of(
            await self._retried(timeout_s, lambda left_s: self._calls.embed(request, timeout_s=left_s, metadata=metadata))
        )

    async def score(self, model: str, query: str, documents: Sequence[str], **options: Unpack[ScoreOptions]) -> Scores:
        """How well documents answer a query, of a model that ranks or embeds."""
        request, timeout_s = score_request(model, query, documents, options)
        metadata = self._settings.metadata()
        timeout_s = self._settings.timeout_s if timeout_s is None else timeout_s
        return scores_of(
            await self._retried(timeout_s, lambda left_s: self._calls.score(request, timeout_s=left_s, metadata=metadata))
        )

    async def list_models(self, *, timeout_s: float = UNARY_TIMEOUT_S) -> tuple[ModelInfo, ...]:
        """The models served."""
        metadata = self._settings.metadata()
        return models_of(
            await self._retried(timeout_s, lambda left_s: self._calls.list_models(timeout_s=left_s, metadata=metadata))
        )

    async def status(self, deployment: str = "", *, timeout_s: float = UNARY_TIMEOUT_S) -> ServiceStatus:
        """Pools, workers and load, of one deployment or ("") of all."""
        metadata = self._settings.metadata()
        return status_of(
            await self._retried(timeout_s, lambda left_s: self._calls.get_status(deployment, timeout_s=left_s, metadata=metadata))
        )

    async def close(self) -> None:
        """Close the connection; what still runs ends as Cancelled. Idempotent."""
        await self._calls.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def _retried(self, timeout_s: float, call: Callable[[float], Awaitable[T]]) -> T:
        attempts = Attempts(self._settings.retry, timeout_s)
        while True:
            try:
                return await call(attempts.timeout_s())
            except AntiphonError as error:
                await asyncio.sleep(attempts.pause_s(error))
