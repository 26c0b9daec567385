"""How many drafts each request gets, from what steps cost and how often drafts are taken (step speed, pure but for its memory).

A step of B requests and n drafts makes B tokens and those drafts that are taken, and costs what a step of B + n rows costs. Drafts
are added by falling chance, and so many are kept that tokens per second are most: none where rows cost more than they bring. Both
sides are measured: ``StepCosts`` by rows, ``Acceptance`` by a draft's confidence, for one request and for all.
Must not know: requests' tokens, drafters, clocks.
"""

from __future__ import annotations

import bisect
import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

PRIOR_ROW = 1 / 16  # of a step of one row, what a further row costs before it was measured
PRIOR_DRAFTING = 1 / 8  # of a step of one row, what each further place of drafts costs to make where they aren't free
LEAST_GAIN = 1.02  # drafts that promise less are left out: estimates are no better than that
_WEIGHT = 0.15  # of the newest time in a size's mean
_BELIEVED = 2  # steps of a size from which its mean is
_OUTLIER = 3.0  # times further from the mean count as so far
_EXACT_ROWS = 32  # above, sizes of one eighth of an octave share a mean
_OWN_AFTER = 6.0  # drafts after which a request's own share weighs as much as that of all
_FADE, _FADE_ALL = 0.9, 0.99  # per draft, of what was seen before


@dataclass(slots=True)
class _Mean:
    seconds: float
    num_seen: int = 0

    def add(self, seconds: float) -> None:
        self.num_seen += 1
        if self.num_seen == 2:
            self.seconds = min(self.seconds, seconds)  # the first of a size warms up
            return
        seconds = min(max(seconds, self.seconds / _OUTLIER), self.seconds * _OUTLIER)
        self.seconds += max(_WEIGHT, 1 / self.num_seen) * (seconds - self.seconds)


class StepCosts:
    """Seconds of a step of decodes by its rows, as measured; on a line between sizes that were seen, by ``PRIOR_ROW`` beyond.

    A size counts from its second step on: the first one warms up, and would make its neighbours look so dear that they are never
    tried, and it never again.
    """

    def __init__(self) -> None:
        self._means: dict[int, _Mean] = {}
        self._sizes: list[int] = []  # that are believed

    def note(self, num_rows: int, seconds: float) -> None:
        """A step took so long; times that are not above 0 are of a clock that stands."""
        if seconds <= 0.0:
            return
        size = _size(num_rows)
        mean = self._means.get(size)
        if mean is None:
            mean = self._means[size] = _Mean(seconds)
        mean.add(seconds)
        if mean.num_seen == _BELIEVED:
            bisect.insort(self._sizes, size)

    def estimate(self, num_rows: int) -> float:
        """What a step of so many rows costs; in seconds, or before any was seen in those of one row."""
        sizes = self._sizes
        if not sizes:
            return _prior(num_rows)
        at = bisect.bisect_left(sizes, num_rows)
        if at < len(sizes) and sizes[at] == num_rows:
            return self._means[num_rows].seconds
        if at == 0:
            return self._means[sizes[0]].seconds * _prior(num_rows) / _prior(sizes[0])
        low = sizes[at - 1]
        low_s = self._means[low].seconds
        if at == len(sizes):
            return low_s * _prior(num_rows) / _prior(low)
        high = sizes[at]
        return low_s + (self._means[high].seconds - low_s) * (num_rows - low) / (high - low)


def _prior(num_rows: int) -> float:
    return 1.0 + PRIOR_ROW * (num_rows - 1)


def _size(num_rows: int) -> int:
    if num_rows <= _EXACT_ROWS:
        return num_rows
    step = 1 << (num_rows.bit_length() - 4)
    return num_rows // step * step


@dataclass(slots=True)
class Share:
    """Drafts that were looked at and those of them that were taken; the old fades."""

    taken: float
    seen: float

    def note(self, is_taken: bool, fade: float) -> None:
        """Take in one draft."""
        self.seen = self.seen * fade + 1.0
        self.taken = self.taken * fade + is_taken


@dataclass(slots=True)
class RequestAcceptance:
    """One request's shares, by confidence."""

    shares: dict[int, Share] = field(default_factory=dict)


class Acceptance:
    """How often drafts are taken, of all requests and of each. ``priors``: by confidence, before anything was seen."""

    def __init__(self, priors: Sequence[float]) -> None:
        self._all = [Share(2.0 * prior, 2.0) for prior in priors]

    def share(self, confidence: int, own: RequestAcceptance) -> float:
        """The chance of a draft, given those before it."""
        everyone = self._all[confidence]
        general = everyone.taken / everyone.seen
        mine = own.shares.get(confidence)
        if mine is None:
            return general
        return (mine.taken + _OWN_AFTER * general) / (mine.seen + _OWN_AFTER)

    def note(self, confidences: Sequence[int], own: RequestAcceptance, *, num_taken: int) -> None:
        """Of drafts of such confidences the first ``num_taken`` were taken: those after the first miss say nothing."""
        for place, confidence in enumerate(confidences[: num_taken + 1]):
            self._all[confidence].note(place < num_taken, _FADE_ALL)
            own.shares.setdefault(confidence, Share(0.0, 0.0)).note(place < num_taken, _FADE)


class DraftingCosts:
    """Seconds of making drafts by the most that one request gets: they are made place by place, for all requests together."""

    def __init__(self) -> None:
        self._by_depth = StepCosts()
        self._depths: set[int] = set()

    def note(self, depth: int, seconds: float) -> None:
        """Drafts of so many places took so long."""
        if seconds > 0.0:
            self._by_depth.note(depth, seconds)
            self._depths.add(depth)

    def estimate(self, depth: int, step_s: float) -> float:
        """What ``depth`` places cost; before any was seen, by what a step of one row costs, ``step_s``."""
        if depth == 0:
            return 0.0
        if not self._depths:
            return PRIOR_DRAFTING * depth * step_s
        longest = max(self._depths)
        if depth > longest:  # a place beyond costs what one before did, on average
            return self._by_depth.estimate(longest) * depth / longest
        return self._by_depth.estimate(depth)


def _free(_depth: int) -> float:
    return 0.0


def choose(
    cost: Callable[[int], float],
    num_rows: int,
    shares: Sequence[Sequence[float]],
    room: int,
    drafting: Callable[[int], float] = _free,
) -> list[int]:
    """Drafts of each proposal in a step that has ``num_rows`` rows without any; of one of equal tokens per second, the fewer.

    Args:
        cost: of a step by its rows.
        shares: by proposal, the chance of each of its drafts, given those before it.
        room: rows that the step may have besides.
        drafting: what drafts cost to make, by the most that one request gets.
    """
    chances = sorted(
        (
            (chance, -place, index)
            for index, each in enumerate(shares)
            for place, chance in enumerate(itertools.accumulate(each, operator.mul), 1)
        ),
        reverse=True,
    )[: max(0, room)]
    tokens = float(num_rows)
    best_rate, best, depth = LEAST_GAIN * tokens / cost(num_rows), 0, 0
    for number, (chance, place, _) in enumerate(chances, 1):
        tokens += chance
        depth = max(depth, -place)
        rate = tokens / (cost(num_rows + number) + drafting(depth))
        if rate > best_rate:
            best_rate, best = rate, number
    counts = [0] * len(shares)
    for _, _, index in chances[:best]:
        counts[index] += 1
    return counts
