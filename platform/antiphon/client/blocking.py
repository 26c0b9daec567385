"""The blocking client (request speed). Any number of threads may use one client; a stream belongs to one of them.

Must not know: how messages look, or when to try again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
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
from antiphon.rpc.client_channel import InferenceCalls, ResponseStream, Tls
from antiphon.rpc.v1 import inference_pb2 as pb

T = TypeVar("T")
Start = Callable[[pb.GenerateRequest, float], ResponseStream]


class Stream:
    """An answer as it comes: iterate for its chunks. Closing it before its end cancels the request on the server.

        with client.stream("m", prompt="Hello") as stream:
            for chunk in stream:
                print(chunk.text, end="")

    One thread iterates; any thread may close.
    """

    def __init__(self, start: Start, request: pb.GenerateRequest, attempts: Attempts) -> None:
        self._start = start
        self._state = StreamState(request, attempts)
        self._call: ResponseStream | None = None
        self._closed = threading.Event()

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

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Chunk:
        while not self._state.ended:
            try:
                chunk = self._receive()
            except AntiphonError as error:
                self._drop_call()
                if self._closed.is_set():
                    raise Cancelled("the stream is closed") from error
                self._closed.wait(self._state.pause_after(error))
                continue
            if chunk is not None:
                return chunk
        raise StopIteration

    def completion(self) -> Completion:
        """Read to the end and return the whole answer; after ``close``, what had come by then."""
        for _ in self:
            pass
        return self._state.completion()

    def close(self) -> None:
        """Cancel the request unless it has ended. Idempotent."""
        self._closed.set()
        if not self._state.ended:
            self._state.ended = True
            self._drop_call()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _receive(self) -> Chunk | None:
        if self._call is None:
            self._call = self._start(self._state.request, self._state.attempts.timeout_s())
        response = self._call.receive()
        if response is not None and self._state.wants_routed:
            self._state.note_routed(self._call.routed())
        return self._state.feed(response)

    def _drop_call(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            call.cancel()


class Client:
    """A blocking client of one endpoint.

    Calls raise the errors of ``antiphon.core.errors``, whichever end they come from. What is refused or lost is tried again
    within ``timeout_s``, as ``retry`` says; an answer that has begun goes on behind the tokens that have come.

    Args:
        endpoint: host:port of the gRPC door.
        api_key: sent as a bearer token.
        tls: None = plain text.
        timeout_s: deadline of generate and stream where the call gives none.
        retry: how patient it is.

    Raises:
        InvalidInput: a setting can't be.
    """

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
        self._calls = InferenceCalls(endpoint, tls)
        self._closed = threading.Event()

    def generate(self, model: str, **options: Unpack[GenerateOptions]) -> Completion:
        """The whole answer; ``GenerateOptions`` lists what may be asked."""
        with self.stream(model, **options) as stream:
            return stream.completion()

    def stream(self, model: str, **options: Unpack[GenerateOptions]) -> Stream:
        """The answer as it comes; ``GenerateOptions`` lists what may be asked."""
        request = generate_request(model, options)
        metadata = self._settings.metadata(options)

        def start(request: pb.GenerateRequest, timeout_s: float) -> ResponseStream:
            return self._calls.generate(request, timeout_s=timeout_s, metadata=metadata)

        return Stream(start, request, Attempts(self._settings.retry, self._settings.timeout_of(options)))

    def embed(self, model: str, **options: Unpack[EmbedOptions]) -> Embeddings:
        """Vectors of texts or token ids, of a model that embeds; ``EmbedOptions`` lists what may be asked."""
        request, timeout_s = embed_request(model, options)
        metadata = self._settings.metadata()
        timeout_s = self._settings.timeout_s if timeout_s is None else timeout_s
        return embeddings_of(
            self._retried(timeout_s, lambda left_s: self._calls.embed(request, timeout_s=left_s, metadata=metadata))
        )

    def score(self, model: str, query: str, documents: Sequence[str], **options: Unpack[ScoreOptions]) -> Scores:
        """How well documents answer a query, of a model that ranks or embeds."""
        request, timeout_s = score_request(model, query, documents, options)
        metadata = self._settings.metadata()
        timeout_s = self._settings.timeout_s if timeout_s is None else timeout_s
        return scores_of(self._retried(timeout_s, lambda left_s: self._calls.score(request, timeout_s=left_s, metadata=metadata)))

    def list_models(self, *, timeout_s: float = UNARY_TIMEOUT_S) -> tuple[ModelInfo, ...]:
        """The models served."""
        metadata = self._settings.metadata()
        return models_of(self._retried(timeout_s, lambda left_s: self._calls.list_models(timeout_s=left_s, metadata=metadata)))

    def status(self, deployment: str = "", *, timeout_s: float = UNARY_TIMEOUT_S) -> ServiceStatus:
        """Pools, workers and load, of one deployment or ("") of all."""
        metadata = self._settings.metadata()
        return status_of(
            self._retried(timeout_s, lambda left_s: self._calls.get_status(deployment, timeout_s=left_s, metadata=metadata))
        )

    def close(self) -> None:
        """Close the connection; what still runs ends as Cancelled. Idempotent."""
        self._closed.set()
        self._calls.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _retried(self, timeout_s: float, call: Callable[[float], T]) -> T:
        attempts = Attempts(self._settings.retry, timeout_s)
        while True:
            try:
                return call(attempts.timeout_s())
            except AntiphonError as error:
                self._closed.wait(attempts.pause_s(error))
