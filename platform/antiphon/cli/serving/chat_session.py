"""A conversation: its history, and one answer at a time with its times (request speed). Must not know: terminals."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from antiphon.client import CallPiece, Client, FinishReason, GenerateOptions, Message, ToolCall
from antiphon.client.answer import calls_of
from antiphon.core.errors import InvalidInput, Unavailable


@dataclass(frozen=True, slots=True)
class Piece:
    """What a reader sees next, and what it is."""

    kind: Literal["text", "thought", "call"]
    text: str
    begins: bool = False  # a call


@dataclass(slots=True)
class Turn:
    """One answer while it comes. ``end`` is what ended it: its finish reason, or None when it was cancelled."""

    text: str = ""
    calls: list[CallPiece] = field(default_factory=list)
    num_tokens: int = 0
    first_token_s: float | None = None  # since it was asked
    last_token_s: float | None = None  # the same
    end: FinishReason | None = None
    answered_by: str = ""  # the expert of a composition, and why

    @property
    def tokens_per_s(self) -> float | None:
        """Speed after the first token; None where there is no second one."""
        if self.first_token_s is None or self.last_token_s is None or self.num_tokens < 2:
            return None
        passed_s = self.last_token_s - self.first_token_s
        return (self.num_tokens - 1) / passed_s if passed_s > 0 else None

    def summary(self) -> str:
        """One line about its times."""
        if self.first_token_s is None:
            return "cancelled before the first token" if self.end is None else "an empty answer"
        parts = [f"first token {self.first_token_s:.2f} s", f"{self.num_tokens} tokens"]
        if self.tokens_per_s is not None:
            parts.append(f"{self.tokens_per_s:.1f} tokens/s")
        if self.end is None:
            parts.append("cancelled")
        if self.end is FinishReason.LENGTH:
            parts.append("cut at the token limit")
        if self.answered_by:
            parts.append(f"answered by {self.answered_by}")
        return ", ".join(parts)


@dataclass(slots=True, kw_only=True)
class Session:
    """A conversation with one model. One thread uses it."""

    client: Client
    model: str
    system: str | None = None
    options: GenerateOptions = field(default_factory=GenerateOptions)
    clock: Callable[[], float] = time.monotonic
    history: list[Message] = field(default_factory=list)

    def reset(self) -> None:
        """Forget the conversation; the system prompt stays."""
        self.history.clear()

    @property
    def waiting_calls(self) -> tuple[ToolCall, ...]:
        """Calls of the last answer, whose results come next."""
        return self.history[-1].tool_calls if self.history else ()

    def ask(self, text: str, turn: Turn) -> Generator[Piece, None, None]:
        """The answer as it comes, thoughts and calls apart; ``turn`` is filled meanwhile.

        An answer that is left early is cancelled on the server; what came of it stays in the history, as the reader has seen
        it. A question that got nothing is forgotten. Raises the errors of ``core.errors``.
        """
        return self._go_on([Message(role="user", content=text)], turn)

    def give(self, results: Sequence[str], turn: Turn) -> Generator[Piece, None, None]:
        """What the model says to its calls' results, in their order. As ``ask``."""
        calls = zip(self.waiting_calls, results, strict=True)
        return self._go_on([Message(role="tool", content=text, tool_call_id=call.id) for call, text in calls], turn)

    def _go_on(self, said: list[Message], turn: Turn) -> Generator[Piece, None, None]:
        system = [] if self.system is None else [Message(role="system", content=self.system)]
        asked_s = self.clock()
        options: GenerateOptions = {**self.options, "messages": [*system, *self.history, *said]}
        try:
            with self.client.stream(self.model, **options) as stream:
                for chunk in stream:
                    if not turn.answered_by and (expert := stream.routed.get("x-antiphon-expert")):
                        turn.answered_by = f"{expert} ({stream.routed.get('x-antiphon-reason', '')})"
                    if chunk.token_ids or chunk.text or chunk.thought:
                        turn.last_token_s = self.clock() - asked_s
                        if turn.first_token_s is None:
                            turn.first_token_s = turn.last_token_s
                    turn.num_tokens += len(chunk.token_ids)
                    turn.text += chunk.text
                    if chunk.finish_reason is not None:
                        turn.end = chunk.finish_reason
                    if chunk.thought:
                        yield Piece("thought", chunk.thought)
                    if chunk.text:
                        yield Piece("text", chunk.text)
                    for call in chunk.calls:
                        turn.calls.append(call)
                        if call.name:
                            yield Piece("call", f"{call.name}(", begins=True)
                        if call.arguments:
                            yield Piece("call", call.arguments)
                        if call.is_whole:
                            yield Piece("call", ")")
        finally:
            if turn.text or turn.calls:
                self.history += [*said, Message(role="assistant", content=turn.text, tool_calls=calls_of(turn.calls))]


def choose_model(client: Client, wanted: str | None) -> str:
    """The model to talk to: the one wanted, or the only one there is.

    Raises:
        Unavailable: none is served.
        InvalidInput: several are served, and none was named.
    """
    if wanted is not None:
        return wanted
    models = client.list_models()
    if not models:
        raise Unavailable("no model is served there")
    if len(models) > 1:
        names = ", ".join(model.id if model.ready else f"{model.id} (not ready)" for model in models)
        raise InvalidInput(f"several models are served; choose one with --model: {names}", "model")
    return models[0].id
