"""One choice's tokens to text with stop strings: a pure state machine (request speed: once per token).

Its state after a run of tokens doesn't depend on how they came, so that a choice which goes on elsewhere, replayed up to
where it was, goes on with exactly the text that is missing. Must not know: workers or streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from antiphon.gateway.text.stops import StopMatcher
from antiphon.gateway.text.tokenizer import TextModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What tokens gave: final text, and how many of them count (fewer than were fed when a stop string ended it)."""

    text: str
    num_tokens: int


class ChoiceText:
    """Detokenizes and watches for stop strings.

    Args:
        model: whose tokens they are.
        stops: stop strings.
        include_stop: keep the stop string, or the stop token's text.
        min_tokens: stop strings that end within the first so many tokens don't count.
        skip_special_tokens: special tokens give no text.
    """

    def __init__(
        self,
        model: TextModel,
        *,
        stops: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
    ) -> None:
        self._detokenizer = model.detokenizer(skip_special_tokens=skip_special_tokens)
        self._matcher = StopMatcher(stops, include_stop=include_stop)
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self.num_tokens = 0

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the choice, if one did."""
        return self._matcher.matched

    def feed(self, token_ids: Sequence[int]) -> Piece:
        """Take tokens; after a stop string the rest of them, and all that follow, don't count."""
        parts = []
        for position, token_id in enumerate(token_ids):
            self.num_tokens += 1
            parts.append(self._take(self._detokenizer.feed(token_id)))
            if self._matcher.matched is not None:
                return Piece(text="".join(parts), num_tokens=position + 1)
        return Piece(text="".join(parts), num_tokens=len(token_ids))

    def finish(self, token_ids: Sequence[int], *, stop_token: bool) -> Piece:
        """Take the last tokens; with ``stop_token`` the last of them ended the choice and gives text only if asked for."""
        num_silent = 1 if stop_token and token_ids and not self._include_stop else 0
        piece = self.feed(token_ids[: len(token_ids) - num_silent])
        if self._matcher.matched is not None:
            return piece
        self.num_tokens += num_silent
        text = piece.text + self._take(self._detokenizer.flush())
        if self._matcher.matched is None:
            text += self._matcher.flush()
        return Piece(text=text, num_tokens=len(token_ids))

    def _take(self, text: str) -> str:
        return text if self.num_tokens <= self._min_tokens else self._matcher.feed(text)
