"""What a stream knows whichever client reads it: the answer so far, and how it goes on after a loss (request speed).

    asking ──chunk──► answering ──usage──► ended
       │                  │ lost, may go on        ▲
       └──lost, may retry─┴──► asking again ───────┘ lost for good, or closed

Decides only; calls and waiting are the streams'. Must not know: threads, tasks or connections.
"""

from __future__ import annotations

from collections.abc import Mapping

from antiphon.client.answer import Answer
from antiphon.client.retry import Attempts
from antiphon.client.values import Chunk, Completion, Usage
from antiphon.core.errors import AntiphonError
from antiphon.rpc.v1 import inference_pb2 as pb


class StreamState:
    """Owned by one stream."""

    def __init__(self, request: pb.GenerateRequest, attempts: Attempts) -> None:
        self.request = request  # what the next call asks for
        self.attempts = attempts
        self.ended = False
        self._answer = Answer()
        self._routed: dict[str, str] | None = None

    @property
    def request_id(self) -> str:
        """The request's id; empty until the server has said it."""
        return self._answer.started.request_id

    @property
    def routed(self) -> Mapping[str, str]:
        """What a composition says of its answer; empty for other models, and before the first chunk."""
        return {} if self._routed is None else self._routed

    @property
    def wants_routed(self) -> bool:
        """True until the call's headers have been noted."""
        return self._routed is None

    @property
    def usage(self) -> Usage | None:
        """Tokens and times; None until the end."""
        return self._answer.usage

    def note_routed(self, routed: dict[str, str]) -> None:
        """Keep what the call's headers say."""
        self._routed = routed

    def feed(self, response: pb.GenerateResponse | None) -> Chunk | None:
        """Take a call's next response, None = its end; the chunk it brings, if any.

        Raises:
            Unavailable: the call ended and its answer is not whole.
        """
        if response is None:
            self._answer.check_whole()
            self.ended = True
            return None
        chunk = self._answer.feed(response)
        if chunk is not None:
            self.attempts.progressed()
        return chunk

    def pause_after(self, error: AntiphonError) -> float:
        """Seconds to wait before asking again with ``request``, after a call failed.

        Raises:
            AntiphonError: ``error``, where nothing may be asked again; the stream has ended.
        """
        try:
            pause_s = self.attempts.pause_s(error)
            if self._answer.has_tokens:
                request = self._answer.resumption(self.request) if self.attempts.may_resume else None
                if request is None:
                    raise error
                self.request = request
        except AntiphonError:
            self.ended = True
            raise
        return pause_s

    def completion(self) -> Completion:
        """Everything so far."""
        return self._answer.completion()
