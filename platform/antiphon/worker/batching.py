"""Decides when rows that arrived for a layer are computed: at once, or with those of peers that are due for the same layer (hot).

A layer's weights are read once for all rows that are computed together, so an FFN worker wants its attention peers in step. Rows of
one peer are held for another's while that one is due for the same layer, but never longer than ``max_wait_s`` after they arrived:

    peer 0:  ──3──     ──4──     ──5──            both due for layer 4 within the bound: one batch
    peer 1:    ──3── ... ──4── ...                a layer or more apart: whoever is ahead is held for the bound at every layer,
                                                  until the other has caught up

The bound has to be longer than a batch for that to work: who arrives while the other is computed starts a batch later, every time.

It only watches: what it knows of a peer is when it was answered and how long it usually takes to its next rows. Peers of very
different pace are not held for each other, nor is anybody held for a peer that is late for its own habits. The streams of one peer,
its ubatches, never wait for each other. Must not know: rows, links, what is computed.

    stream   ── arrived ──►  here  ── answered ──►  away (due for the layer that follows)  ── arrived ──► ...
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

P = TypeVar("P")  # a peer, by identity

_WEIGHT = 0.2  # of the newest time in the running means
_ALIKE = 1.3  # peers are kept in step when neither takes longer from layer to layer than this times the other
_LATE = 3.0  # times its usual time, and a little: a peer that has not come by then is not waited for
_LITTLE_S = 200e-6


@dataclass(slots=True)
class _Stream(Generic[P]):
    """One ubatch of one peer."""

    peer: P
    ubatch: int
    layer: int = -1  # of its last rows
    is_here: bool = False
    arrived_s: float = 0.0
    answered_s: float = 0.0
    usual_s: dict[bool, float] = field(default_factory=dict)  # from answer to next rows; True: into a new step

    def note(self, wraps: bool, seconds: float) -> None:
        before = self.usual_s.get(wraps)
        self.usual_s[wraps] = seconds if before is None else before + _WEIGHT * (seconds - before)


class Batching(Generic[P]):
    """Watches the streams of an FFN worker's peers. Belongs to its loop; times are seconds of one clock."""

    def __init__(self, max_wait_s: float) -> None:
        self.max_wait_s = max_wait_s
        self._streams: dict[tuple[P, int], _Stream[P]] = {}
        self._next: dict[int, int] = {}  # which layer follows which
        self._batch_s = 0.0  # a batch usually takes

    def arrived(self, peer: P, ubatch: int, layer: int, now_s: float) -> None:
        """Rows came."""
        stream = self._streams.get((peer, ubatch))
        if stream is None:
            stream = self._streams[peer, ubatch] = _Stream(peer, ubatch)
        elif not stream.is_here:
            self._next[stream.layer] = layer
            stream.note(layer <= stream.layer, now_s - stream.answered_s)
        stream.layer, stream.is_here, stream.arrived_s = layer, True, now_s

    def answered(self, peer: P, ubatch: int, now_s: float, batch_s: float) -> None:
        """Their result went back, computed in ``batch_s``."""
        stream = self._streams.get((peer, ubatch))
        if stream is not None:
            stream.is_here, stream.answered_s = False, now_s
            self._batch_s += _WEIGHT * (batch_s - self._batch_s)

    def keep(self, is_left: Callable[[P], bool]) -> None:
        """Forget peers that have left."""
        for key in [key for key in self._streams if not is_left(key[0])]:
            del self._streams[key]

    def hold_until(self, peer: P, ubatch: int, now_s: float) -> float:
        """When the rows of this stream, which are here, are to be computed; ``now_s`` or earlier means now."""
        mine = self._streams.get((peer, ubatch))
        if mine is None or len(self._streams) < 2:
            return now_s
        bound_s = mine.arrived_s + self.max_wait_s
        until_s = now_s
        for other in self._streams.values():
            if other.ubatch == mine.ubatch and other.peer != mine.peer:
                until_s = max(until_s, min(bound_s, self._worth_until(mine, other, now_s)))
        return until_s

    def _worth_until(self, mine: _Stream[P], other: _Stream[P], now_s: float) -> float:
        """Until when ``other`` is worth waiting for; before ``now_s`` if it is not."""
        if other.is_here:
            layer = other.layer
            if layer == mine.layer:
                return 0.0
        else:
            following = self._next.get(other.layer)
            usual_s = None if following is None else other.usual_s.get(following <= other.layer)
            if following is None or usual_s is None:
                return 0.0
            layer = following
            late_s = other.answered_s + _LATE * usual_s + _LITTLE_S
            if now_s > late_s:  # late for its own habits, or gone
                return 0.0
            if layer == mine.layer:
                return late_s if other.answered_s + usual_s < mine.arrived_s + self.max_wait_s else 0.0
        here_s, there_s = self._way_s(other, layer, mine.layer), self._way_s(mine, mine.layer, layer)
        if here_s is None or there_s is None or here_s >= there_s or not self._are_alike(mine, other):
            return 0.0
        return mine.arrived_s + self.max_wait_s

    def _are_alike(self, one: _Stream[P], other: _Stream[P]) -> bool:
        """True when two streams take about as long from layer to layer."""
        one_s, other_s = one.usual_s[False] + self._batch_s, other.usual_s[False] + self._batch_s
        return one_s < _ALIKE * other_s and other_s < _ALIKE * one_s

    def _way_s(self, stream: _Stream[P], layer: int, goal: int) -> float | None:
        """How long a stream usually takes from one layer to another; None if that is not known."""
        pace_s, step_s = stream.usual_s.get(False), stream.usual_s.get(True)
        if pace_s is None or step_s is None:
            return None
        way_s = 0.0
        for _ in range(len(self._next)):
            if layer == goal:
                return way_s
            following = self._next.get(layer)
            if following is None:
                return None
            way_s += self._batch_s + (step_s if following <= layer else pace_s)
            layer = following
        return None
