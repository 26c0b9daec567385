"""How many ubatches a step is cut into, from what steps took: the meaning of "auto" (step speed).

More ubatches hide the FFN side and the transfers behind the attention side, and cost what is paid per ubatch: weights read again,
operators launched again. Which weighs more depends on rows, model and machine, so it is measured: ``candidates`` says how many can
pay at all, m = 2 (1 + T_c / T_f) by the theory of the two-stage ring; ``pick`` goes up from 1 for as long as that is faster, takes
the fastest, and now and then tries a neighbour. Steps of about as many rows are compared with each other, and those with prompt
chunks apart from pure decodes.
Must not know: tensors, links, clocks.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

KEPT = 5  # newest times of each choice; their median counts
TRIES = 2  # of each candidate before it is judged
PROBE_EVERY = 128  # steps of one size between two trials of what is not the choice
LANE_ROWS = 4  # fewer are not worth reading the weights for once more
SETTLING = 2  # rounds until lanes have drifted apart
WHOLE_SETTLING = 8  # whole steps until their own number of ubatches is found
LANE_TRIES = 4
CLEARLY = 0.03  # by which lanes have to be faster than whole steps: a prompt that comes has to wait until they have landed
_STEPS_PER_OCTAVE = 4


@dataclass(slots=True)
class Trial:
    """What steps of one size took with one number of ubatches."""

    times_s: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))
    last_step: int = 0  # the number, among steps of this size, of the newest


def ubatches_to_hide(t_ffn_s: float, t_transfer_s: float) -> int:
    """The fewest ubatches that hide transfers and FFN where both sides take as long: m >= 2 (1 + T_c / T_f)."""
    return 2 if t_ffn_s <= 0 else math.ceil(2 * (1 + t_transfer_s / t_ffn_s) - 1e-9)


def candidates(num_rows: int, limit: int, t_ffn_s: float, t_transfer_s: float) -> range:
    """Numbers of ubatches worth trying for a step of ``num_rows`` rows; at least 1, at most ``limit``."""
    return range(1, max(1, min(limit, num_rows, ubatches_to_hide(t_ffn_s, t_transfer_s))) + 1)


def pick(trials: Mapping[int, Trial], choices: Sequence[int], step: int, tries: int = TRIES) -> int:
    """The number of ubatches for step number ``step`` of one size.

    Up from the first of ``choices`` for as long as one more is faster, by ``tries`` of each; then the fastest, now and then one of
    its neighbours.
    """
    best, best_s = choices[0], math.inf
    for choice in choices:
        trial = trials.get(choice)
        if trial is None or len(trial.times_s) < tries:
            return choice
        took_s = statistics.median(trial.times_s)
        if took_s >= best_s:
            break
        best, best_s = choice, took_s
    neighbours = [choice for choice in (best - 1, best + 1) if choice in choices]
    if neighbours and step % PROBE_EVERY == 0:
        return min(neighbours, key=lambda choice: trials[choice].last_step if choice in trials else -1)
    return best


class UbatchTuner:
    """Chooses for one attention worker. Belongs to its loop."""

    def __init__(self, limit: int) -> None:
        """``limit``: ubatches that links have slots for."""
        self._limit = limit
        self._trials: dict[tuple[int, bool], dict[int, Trial]] = {}
        self._num_steps: dict[tuple[int, bool], int] = {}
        self._t_ffn_s = self._t_transfer_s = 0.0

    def choose(self, num_rows: int, *, is_decode: bool) -> int:
        """Ubatches for the next step; ``is_decode``: it has one row per request."""
        key = (_size(num_rows), is_decode)
        step = self._num_steps[key] = self._num_steps.get(key, 0) + 1
        choices = candidates(num_rows, self._limit, self._t_ffn_s, self._t_transfer_s)
        return choices[0] if len(choices) == 1 else pick(self._trials.setdefault(key, {}), choices, step)

    def note(
        self, num_rows: int, num_ubatches: int, *, is_decode: bool, step_s: float, t_ffn_s: float, t_transfer_s: float
    ) -> None:
        """The step took ``step_s``; its stages, per exchange, ``t_ffn_s`` and one way ``t_transfer_s``."""
        if num_ubatches == 1:  # with more, answers also wait for this side, and nothing tells how long
            self._t_ffn_s, self._t_transfer_s = t_ffn_s, t_transfer_s
        key = (_size(num_rows), is_decode)
        trial = self._trials.setdefault(key, {}).setdefault(num_ubatches, Trial())
        trial.times_s.append(step_s / num_rows)
        trial.last_step = self._num_steps.get(key, 0)


class LaneTuner:
    """How many lanes a batch of decodes runs in, 1 = its steps are whole, from what a token of every request took. Belongs to the
    worker's loop.

    A round is one step of each lane. Lanes begin together and drift apart, so the first rounds with a number of lanes do not
    count; nor do the first whole steps, which try numbers of ubatches. Where both sides share a memory, what lanes gain in waiting
    they may lose to each other: whole steps stay, unless lanes are clearly faster.
    """

    def __init__(self, limit: int) -> None:
        """``limit``: lanes at most."""
        self._limit = limit
        self._trials: dict[int, dict[int, Trial]] = {}
        self._num_rounds: dict[int, int] = {}  # by size
        self._size = -1
        self._lanes = 1  # as chosen last
        self._num_collected = self._num_rows = self._num_alike = 0  # of this round; rounds with the same choice before it
        self._began_s: float | None = None  # this round, or the whole step before

    def choose(self, num_requests: int) -> int:
        """Lanes for what is launched next."""
        size = _size(num_requests)
        if size == self._size and (0 < self._num_collected < self._lanes or (self._lanes > 1 and self._began_s is None)):
            return self._lanes  # within a round
        most = max(1, min(self._limit, num_requests // LANE_ROWS))
        self._num_rounds[size] = number = self._num_rounds.get(size, 0) + 1
        lanes = 1 if most == 1 else pick(self._trials.setdefault(size, {}), range(1, most + 1), number, LANE_TRIES)
        if size != self._size or lanes != self._lanes:
            self._num_alike, self._began_s = 0, None
        self._size, self._lanes = size, lanes
        self._num_collected = self._num_rows = 0
        return lanes

    def begin(self) -> None:
        """The first lane is launched: what came before was not steps in lanes."""
        self._num_collected = self._num_rows = self._num_alike = 0
        self._began_s = None

    def collected(self, num_rows: int, now_s: float) -> None:
        """A lane's step is over."""
        self._num_collected += 1
        self._num_rows += num_rows
        if self._num_collected < self._lanes:
            return
        self._num_alike += 1
        if self._began_s is not None and self._num_alike > SETTLING:
            self._note(self._lanes, (1 + CLEARLY) * (now_s - self._began_s) / self._num_rows)
        self._began_s = now_s

    def executed(self, num_rows: int, start_s: float, end_s: float) -> None:
        """A whole step of decodes took from ``start_s`` to ``end_s``; what lies between two counts too."""
        began_s, self._began_s = self._began_s, end_s
        if self._lanes == 1 and _size(num_rows) == self._size:
            self._num_alike += 1
            settled = self._num_alike > WHOLE_SETTLING or 1 in self._trials.get(self._size, {})
            if settled and began_s is not None and start_s - began_s < end_s - start_s:
                self._note(1, (end_s - began_s) / num_rows)

    def _note(self, lanes: int, seconds: float) -> None:
        trial = self._trials.setdefault(self._size, {}).setdefault(lanes, Trial())
        trial.times_s.append(seconds)
        trial.last_step = self._num_rounds.get(self._size, 0)


def _size(num_rows: int) -> int:
    return round(math.log2(num_rows) * _STEPS_PER_OCTAVE) if num_rows > 0 else 0
