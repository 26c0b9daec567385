"""Drafts by looking the last tokens up in the request's own prompt and output (step speed; constant work per token).

What was said is often said again: code that is edited, a text that is quoted, a form that is filled in. The last four tokens, else
the last two, else the last one are looked up where they stood last, and what followed them there is the draft (prompt look-up
decoding, as in arXiv 2304.04487). A copy that is under way goes on where it is, and the longer it has held the surer it is. One
token is a weak sign, and the first of every copied piece: after the name that a form did not have before, its next label follows.

    ... b c d e f g ...   ... x c d e f        proposal: g ...        the copy runs at ``source``
              └─────┘           └─────┘ tail

How sure a draft is, is told for each: by how long the copy would have held up to it, and by whether the two tokens before it were
followed by the same token at the last two places where they stood. Labels of a form were, its values were not.

Must not know: models, or what becomes of its drafts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice

from antiphon.core.request import RequestId
from antiphon.engine.speculation.drafter import DraftAsked, Proposal

LONG, SHORT, SINGLE = 4, 2, 1  # tokens looked up
_LENGTHS = (SINGLE, SHORT, LONG, 8, 16)  # a match of so many tokens: where it begins a row of three confidences
_ONCE, _CHANGED, _SAME = 0, 1, 2  # what followed the two tokens before: seen once at most; another at its last two places; one
_PRIORS = (
    *(0.2, 0.1, 0.25),
    *(0.3, 0.15, 0.4),
    *(0.5, 0.25, 0.65),
    *(0.8, 0.4, 0.95),
    *(0.9, 0.45, 0.95),
)
_MAX_INDEXED_PER_CALL = 4096  # of a long prompt; the rest follows at the next steps, so that none of them waits
_MAX_PROMPT_TOKENS = 32768  # the newest so many are looked at: an index takes about 350 bytes a token, 450 where much repeats


class _Index:
    """Where the runs of one request's tokens stood last."""

    __slots__ = ("copied", "first", "followed", "num_indexed", "num_seen", "places", "source")

    def __init__(self, num_tokens: int) -> None:
        self.first = max(0, num_tokens - _MAX_PROMPT_TOKENS)
        self.num_indexed = self.first  # tokens that have been the end of a run in ``places``
        self.places: dict[int, dict[tuple[int, ...], int]] = {LONG: {}, SHORT: {}, SINGLE: {}}  # size -> run -> the place after it
        self.followed: dict[tuple[int, ...], int] = {}  # runs of SHORT that stood more than once -> _CHANGED or _SAME
        self.num_seen = 0  # tokens when last asked
        self.source: int | None = None  # where the copy under way goes on
        self.copied = 0  # tokens for which it has held

    def extend(self, tokens: Sequence[int], end: int) -> None:
        """Take in the runs that end before ``end``, which has a token."""
        end = min(end, self.num_indexed + _MAX_INDEXED_PER_CALL)
        for size, places in self.places.items():
            begin = max(self.first, self.num_indexed - size + 1)  # of the first run that ends behind what is indexed
            window = tokens[begin:end]
            runs = zip(*(islice(window, i, None) for i in range(size)), strict=False)
            if size == SHORT:
                self._compare(tokens, zip(runs, range(begin + size, end + 1), strict=False))
            else:
                places.update(zip(runs, range(begin + size, end + 1), strict=False))
        self.num_indexed = max(self.num_indexed, end)

    def _compare(self, tokens: Sequence[int], runs: Iterable[tuple[tuple[int, ...], int]]) -> None:
        places = self.places[SHORT]
        for run, place in runs:
            before = places.get(run)
            if before is not None:
                self.followed[run] = _SAME if tokens[before] == tokens[place] else _CHANGED
            places[run] = place

    def confidences(self, tokens: Sequence[int], drafts: Sequence[int]) -> tuple[int, ...]:
        """Of each of the drafts of the copy under way."""
        text = (*tokens[-SHORT:], *drafts)
        return tuple(
            3 * _place(self.copied + place) + self.followed.get(text[place : place + SHORT], _ONCE) for place in range(len(drafts))
        )

    def follow(self, tokens: Sequence[int]) -> None:
        """Go on with the copy under way if it held for what came since; else look for another."""
        num_new = len(tokens) - self.num_seen
        self.num_seen = len(tokens)
        source = self.source
        if source is not None and tokens[source : source + num_new] == tokens[len(tokens) - num_new :]:
            self.source, self.copied = source + num_new, self.copied + num_new
            if self.copied >= LONG:
                return
        self.source, self.copied = None, 0
        for size, places in self.places.items():
            found = places.get(tuple(tokens[-size:]))
            if found is not None and found < len(tokens):
                self.source, self.copied = found, _match(tokens, found, size)
                return


def _match(tokens: Sequence[int], source: int, least: int) -> int:
    """How many tokens before ``source`` equal the last ones, to the steps of ``_LENGTHS``."""
    length = least
    for longer in _LENGTHS:
        if longer <= length:
            continue
        if longer > source or tokens[source - longer : source - length] != tokens[-longer:-length]:
            break
        length = longer
    return length


class NgramDrafter:
    """See the module. ``name``, ``is_free`` and ``priors`` are the seam's."""

    name = "ngram"
    is_free = True
    priors: Sequence[float] = _PRIORS

    def __init__(self) -> None:
        self._indices: dict[RequestId, _Index] = {}

    def propose(self, asked: Mapping[RequestId, DraftAsked]) -> Mapping[RequestId, Proposal]:
        """What followed the last tokens where they stood last; left out where they are new."""
        found: dict[RequestId, Proposal] = {}
        for request_id, wanted in asked.items():
            tokens = wanted.token_ids
            index = self._indices.get(request_id)
            if index is None:
                index = self._indices[request_id] = _Index(len(tokens))
            index.extend(tokens, len(tokens) - 1)  # the last token's own runs would find themselves
            index.follow(tokens)
            if index.source is not None:
                drafts = _copy(tokens, index.source, wanted.num_drafts)
                found[request_id] = Proposal(token_ids=drafts, confidences=index.confidences(tokens, drafts))
        return found

    def forget(self, request_id: RequestId) -> None:
        """Drop the request's index."""
        self._indices.pop(request_id, None)


def _copy(tokens: Sequence[int], source: int, count: int) -> tuple[int, ...]:
    """``count`` tokens from ``source`` on; a copy that reaches its own end goes round."""
    piece = tuple(tokens[source : source + count])
    while len(piece) < count:
        piece += piece[: count - len(piece)]
    return piece


def _place(copied: int) -> int:
    place = 0
    while place + 1 < len(_LENGTHS) and copied >= _LENGTHS[place + 1]:
        place += 1
    return place
