"""The Endpoint Picker Protocol of the Gateway API Inference Extension, over Envoy's external processing (request speed).

    request headers ──► (body, as much as tells the conversation) ──► answer to the headers: where to send it ──► body as it comes
    response headers, body, trailers ──► as they come                                end of the stream ──► request ended

The pick stands in the header ``x-gateway-destination-endpoint`` and in the dynamic metadata ``envoy.lb``, first choice first; a
subset in the metadata ``envoy.lb.subset_hint`` is kept to. Nobody to pick: 503. A stream without a message for ASK_S before its
pick, or for ANSWER_S behind it, is ended. Source: the extension's proposal 004, and envoy/service/ext_proc/v3. Must not know: how a
pick is made.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Protocol

import grpc.aio
from google.protobuf.struct_pb2 import Struct

from antiphon.core.errors import DeadlineExceeded
from antiphon.rpc.v1 import ext_proc_pb2 as pb

DESTINATION_HEADER = "x-gateway-destination-endpoint"
SUBSET_NAMESPACE = "envoy.lb.subset_hint"
SUBSET_KEY = "x-gateway-destination-endpoint-subset"
PICK_NAMESPACE = "envoy.lb"
SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"
MAX_KEY_BYTES = 64 * 1024  # of a body are looked at; the rest streams on
ASK_S = 60.0  # between two messages of a request that nothing was picked for
ANSWER_S = 3600.0  # between two of one that is being answered, which may be silent until the answer is whole
_MOST_ENDPOINTS = 3  # a gateway that can't reach the first tries the next


class Board(Protocol):
    """Ranks endpoints and counts what is there; ``gateway.routing.endpoints.EndpointBoard``."""

    def rank(self, key: str, endpoints: Sequence[str]) -> tuple[str, ...]:
        """Best first."""
        ...

    def count(self, endpoint: str) -> AbstractContextManager[None]:
        """A context in which a request is there."""
        ...


class PickerServicer:
    """Answers gateways. Belongs to one event loop.

    Args:
        board: ranks.
        key_of: what names the conversation of a body.
        endpoints: who there is, ``ip:port``; asked for every request, so it remembers.
    """

    name = SERVICE

    def __init__(self, *, board: Board, key_of: Callable[[bytes], str], endpoints: Callable[[], Sequence[str]]) -> None:
        self._board = board
        self._key_of = key_of
        self._endpoints = endpoints

    def add_to(self, server: grpc.aio.Server) -> None:
        """See ``services.Service``."""
        method = grpc.stream_stream_rpc_method_handler(
            self.process,
            request_deserializer=pb.ProcessingRequest.FromString,
            response_serializer=pb.ProcessingResponse.SerializeToString,
        )
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Process": method}),))

    async def process(
        self, requests: AsyncIterable[pb.ProcessingRequest], _context: object
    ) -> AsyncIterator[pb.ProcessingResponse]:
        """One HTTP request and its answer."""
        with ExitStack() as stack:
            turn = _Turn(self, stack)
            arriving = aiter(requests)
            while True:
                silent_s = ANSWER_S if turn.picked else ASK_S
                try:
                    async with asyncio.timeout(silent_s):
                        message = await anext(arriving, None)
                except TimeoutError:
                    raise DeadlineExceeded(f"no message came within {silent_s:g} s") from None
                if message is None:
                    return
                for answer in turn.take(message):
                    yield answer

    def pick(self, body: bytes, subset: Sequence[str] | None, stack: ExitStack) -> tuple[str, ...]:
        """Where to send a request, best first; it counts there until ``stack`` closes."""
        known = self._endpoints()
        eligible = list(known) if subset is None else [e for e in subset if not known or e in known]
        ranked = self._board.rank(self._key_of(body), eligible)[:_MOST_ENDPOINTS]
        if ranked:
            stack.enter_context(self._board.count(ranked[0]))
        return ranked


class _Turn:
    """One stream: what has come, and what was answered."""

    def __init__(self, picker: PickerServicer, stack: ExitStack) -> None:
        self._picker = picker
        self._stack = stack
        self._subset: list[str] | None = None
        self._buffered = False  # the gateway sends a body only when its headers are answered
        self._body = b""
        self._chunks: list[tuple[bytes, bool]] = []
        self.picked = False

    def take(self, message: pb.ProcessingRequest) -> list[pb.ProcessingResponse]:
        if message.HasField("protocol_config"):
            self._buffered = message.protocol_config.request_body_mode in (pb.BUFFERED, pb.BUFFERED_PARTIAL)
        if message.HasField("metadata_context"):
            self._subset = _subset_of(message.metadata_context) or self._subset
        match message.WhichOneof("request"):
            case "request_headers":
                if message.request_headers.end_of_stream:
                    return [self._pick(pb.ProcessingResponse(request_headers=pb.HeadersResponse()))]
                return [pb.ProcessingResponse(request_headers=pb.HeadersResponse())] if self._buffered else []
            case "request_body":
                return self._take_body(message.request_body)
            case "request_trailers":
                trailers = pb.ProcessingResponse(request_trailers=pb.TrailersResponse())
                return [*self._flush(), trailers] if not self.picked else [trailers]
            case "response_headers":
                return [pb.ProcessingResponse(response_headers=pb.HeadersResponse())]
            case "response_body":
                body = message.response_body
                return [pb.ProcessingResponse(response_body=pb.BodyResponse(response=_streamed(body.body, body.end_of_stream)))]
            case "response_trailers":
                return [pb.ProcessingResponse(response_trailers=pb.TrailersResponse())]
        return []

    def _take_body(self, body: pb.HttpBody) -> list[pb.ProcessingResponse]:
        if self._buffered:
            self._body = body.body[:MAX_KEY_BYTES]
            return [self._pick(pb.ProcessingResponse(request_body=pb.BodyResponse()))]
        chunk = (body.body, body.end_of_stream)
        if self.picked:
            return [_body_of(chunk)]
        if body.body or body.end_of_stream:  # others say nothing, and may be without number
            self._chunks.append(chunk)
        self._body += body.body[: MAX_KEY_BYTES - len(self._body)]
        return self._flush() if body.end_of_stream or len(self._body) >= MAX_KEY_BYTES else []

    def _flush(self) -> list[pb.ProcessingResponse]:
        """The answer to the headers, which has waited for the body, and the body so far."""
        first = self._pick(pb.ProcessingResponse(request_headers=pb.HeadersResponse()))
        chunks, self._chunks = self._chunks, []
        if first.WhichOneof("response") == "immediate_response":
            return [first]
        return [first, *map(_body_of, chunks)]

    def _pick(self, answer: pb.ProcessingResponse) -> pb.ProcessingResponse:
        self.picked = True
        endpoints = self._picker.pick(self._body, self._subset, self._stack)
        if not endpoints:
            text = b'{"error": {"message": "no replica can take the request", "type": "unavailable", "code": "unavailable"}}'
            return pb.ProcessingResponse(immediate_response=pb.ImmediateResponse(status=pb.HttpStatus(code=503), body=text))
        told = ",".join(endpoints)
        headers = answer.request_headers if answer.WhichOneof("response") == "request_headers" else answer.request_body
        header = pb.HeaderValue(key=DESTINATION_HEADER, raw_value=told.encode())
        option = pb.HeaderValueOption(header=header, append_action=pb.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD)
        headers.response.header_mutation.set_headers.append(option)
        headers.response.clear_route_cache = True
        inner = Struct()
        inner.update({DESTINATION_HEADER: told})
        answer.dynamic_metadata.update({PICK_NAMESPACE: inner})
        return answer


def _subset_of(metadata: pb.Metadata) -> list[str] | None:
    """The endpoints that the gateway allows; None = all."""
    if SUBSET_NAMESPACE not in metadata.filter_metadata:
        return None
    fields = metadata.filter_metadata[SUBSET_NAMESPACE].fields
    if SUBSET_KEY not in fields:
        return None
    value = fields[SUBSET_KEY]
    texts = (
        [item.string_value for item in value.list_value.values] if value.HasField("list_value") else value.string_value.split(",")
    )
    return [text.strip() for text in texts if text.strip()]


def _streamed(body: bytes, end: bool) -> pb.CommonResponse:
    return pb.CommonResponse(body_mutation=pb.BodyMutation(streamed_response=pb.StreamedBodyResponse(body=body, end_of_stream=end)))


def _body_of(chunk: tuple[bytes, bool]) -> pb.ProcessingResponse:
    return pb.ProcessingResponse(request_body=pb.BodyResponse(response=_streamed(*chunk)))
