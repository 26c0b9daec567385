"""One choice's tokens to text with stop strings: a pure state machine (request speed: once per token).

Its state after a run of tokens doesn't depend on how they came, so that a choice which goes on elsewhere, replayed up to
where it was, goes on with exactly the text that is missing. Must not know: workers or streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from antiphon.gateway.text.events import EventParser, Part, merged
from antiphon.gateway.text.stops import StopMatcher
from antiphon.gateway.text.tokenizer import TextModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What tokens gave: final text and what it means, how many of them count (fewer than were fed when a stop string ended it), and
    where they stand.

    A token's offset is the place in the choice's text of the first character it has a part in; a stop string's own tokens stand at
    the text's end.
    """

    text: str
    num_tokens: int
    offsets: tuple[int, ...] = ()  # one per token that counts
    parts: tuple[Part, ...] = ()  # only where the answer is read for calls and thoughts


class ChoiceText:
    """Detokenizes and watches for stop strings.

    Args:
        model: whose tokens they are.
        stops: stop strings.
        include_stop: keep the stop string, or the stop token's text.
        min_tokens: stop strings that end within the first so many tokens don't count.
        skip_special_tokens: special tokens give no text.
        kept: special tokens that are text all the same.
        parser: reads calls and thoughts; None = the text is all there is.
    """

    def __init__(
        self,
        model: TextModel,
        *,
        stops: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
        kept: Sequence[str] = (),
        parser: EventParser | None = None,
    ) -> None:
        self._detokenizer = model.detokenizer(skip_special_tokens=skip_special_tokens, kept=kept)
        self._parser = parser
        self.num_thought_tokens = 0
        self._matcher = StopMatcher(stops, include_stop=include_stop)
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._num_chars = 0  # that the detokenizer has given out
        self._num_given = 0  # of these, known to be outside any stop string
        self.num_tokens = 0

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the choice, if one did."""
        return self._matcher.matched

    def feed(self, token_ids: Sequence[int]) -> Piece:
        """Take tokens; after a stop string the rest of them, and all that follow, don't count."""
        texts: list[str] = []
        offsets: list[int] = []
        parts: list[Part] = []
        for token_id in token_ids:
            self.num_tokens += 1
            offsets.append(self._num_chars)
            text = self._take(self._detokenizer.feed(token_id))
            texts.append(text)
            self._read(text, parts)
            if self._matcher.matched is not None:
                break
        return self._piece("".join(texts), offsets, parts)

    def finish(self, token_ids: Sequence[int], *, stop_token: bool, truncated: bool = False) -> Piece:
        """Take the last tokens; with ``stop_token`` the last of them ended the choice and gives text only if asked for.
        ``truncated``: the choice did not end by itself.
        """
        num_silent = 1 if stop_token and token_ids and not self._include_stop else 0
        piece = self.feed(token_ids[: len(token_ids) - num_silent])
        text, offsets, parts = piece.text, list(piece.offsets), list(piece.parts)
        if self._matcher.matched is None:
            self.num_tokens += num_silent
            offsets += [self._num_chars] * num_silent
            rest = self._take(self._detokenizer.flush())
            if self._matcher.matched is None:
                held = self._matcher.flush()
                self._num_given += len(held)
                rest += held
            text += rest
            if self._parser is not None:
                parts += self._parser.feed(rest)
        if self._parser is not None:
            parts += self._parser.finish(truncated=truncated and self._matcher.matched is None)
        return self._piece(text, offsets, parts)

    def end_by_stop(self) -> tuple[Part, ...]:
        """A stop string ended the choice while its engine went on: what was held back."""
        return () if self._parser is None else self._parser.finish(truncated=False)

    def _read(self, text: str, parts: list[Part]) -> None:
        """One token's text; the token counts as thought when a thought goes on before or after it."""
        if self._parser is None:
            return
        was_thinking = self._parser.is_thinking
        parts += self._parser.feed(text)
        self.num_thought_tokens += was_thinking or self._parser.is_thinking

    def _take(self, text: str) -> str:
        self._num_chars += len(text)
        given = self._matcher.feed(text, muted=self.num_tokens <= self._min_tokens)
        self._num_given += len(given)
        return given

    def _piece(self, text: str, offsets: list[int], parts: list[Part]) -> Piece:
        # Beyond a stop string there is no text to stand in.
        end = self._num_chars if self._matcher.matched is None else self._num_given
        places = tuple(min(offset, end) for offset in offsets)
        return Piece(text=text, num_tokens=len(offsets), offsets=places, parts=merged(parts))
