"""Gathers the responses of one call into an answer (request speed). Must not know: connections, threads or tasks."""

from __future__ import annotations

from collections.abc import Sequence

from antiphon.client.values import CallPiece, Choice, Chunk, Completion, ToolCall, Usage
from antiphon.client.wire import chunk_of, usage_of
from antiphon.core.errors import Unavailable
from antiphon.rpc.v1 import inference_pb2 as pb


class Answer:
    """What has come so far. Owned by one stream."""

    def __init__(self) -> None:
        self._started = pb.Started()
        self._chunks: dict[int, list[Chunk]] = {}
        self.usage: Usage | None = None

    @property
    def has_tokens(self) -> bool:
        """True once anything came that the application may have seen."""
        return bool(self._chunks)

    @property
    def started(self) -> pb.Started:
        """What the server said first; empty until then."""
        return self._started

    def feed(self, response: pb.GenerateResponse) -> Chunk | None:
        """Take a response; the chunk it brings, if any. Events of a newer server are passed over."""
        match response.WhichOneof("event"):
            case "started":
                if not self._started.request_id:  # a call that goes on repeats it
                    self._started = response.started
            case "delta":
                chunk = chunk_of(response.delta)
                self._chunks.setdefault(chunk.index, []).append(chunk)
                return chunk
            case "completed":
                self.usage = usage_of(response.completed.usage)
        return None

    def check_whole(self) -> None:
        """The call ended well.

        Raises:
            Unavailable: but its answer is not whole.
        """
        if self.usage is None:
            raise Unavailable("the answer ended early", 0.0)

    def resumption(self, request: pb.GenerateRequest) -> pb.GenerateRequest | None:
        """The request for what is still missing after a lost connection.

        The server goes on behind the tokens that have come, with the same seed; text is a function of the tokens, so nothing
        comes twice or is left out. None when that can't be asked for: a choice has finished, and would go on behind its end.
        """
        if not self._started.request_id or any(chunks[-1].finish_reason for chunks in self._chunks.values()):
            return None
        missing = pb.GenerateRequest()
        missing.CopyFrom(request)
        missing.request_id = self._started.request_id
        missing.sampling.seed = self._started.seed
        del missing.resume[:]
        for index, chunks in sorted(self._chunks.items()):
            missing.resume.add(index=index, token_ids=[token_id for chunk in chunks for token_id in chunk.token_ids])
        return missing

    def completion(self) -> Completion:
        """Everything so far."""
        return Completion(
            request_id=self._started.request_id,
            model=self._started.model,
            created=self._started.created,
            seed=self._started.seed,
            choices=tuple(_choice(index, self._chunks[index]) for index in sorted(self._chunks)),
            usage=self.usage,
        )


def calls_of(pieces: Sequence[CallPiece]) -> tuple[ToolCall, ...]:
    """The calls that are whole: an answer that was cut off claims no more."""
    whole = [piece.index for piece in pieces if piece.is_whole]
    return tuple(
        ToolCall(
            id=f"call_{index}",
            name="".join(piece.name for piece in pieces if piece.index == index),
            arguments="".join(piece.arguments for piece in pieces if piece.index == index),
        )
        for index in whole
    )


def _choice(index: int, chunks: list[Chunk]) -> Choice:
    last = chunks[-1]
    return Choice(
        index=index,
        text="".join(chunk.text for chunk in chunks),
        token_ids=tuple(token_id for chunk in chunks for token_id in chunk.token_ids),
        logprobs=tuple(logprob for chunk in chunks for logprob in chunk.logprobs),
        thought="".join(chunk.thought for chunk in chunks),
        tool_calls=calls_of([piece for chunk in chunks for piece in chunk.calls]),
        finish_reason=last.finish_reason,
        stop_string=last.stop_string,
        stop_token_id=last.stop_token_id,
    )
