"""The ubatch pipeline of one decode step: exact simulation, and the closed forms it obeys without variance (control speed).

Ubatches go round in a fixed order; every stage serves them in that order, one at a time:

    A   [u0][u1][u2]      [u0][u1][u2]          attention half of layer l, then of layer l + 1
    a2f     [u0][u1][u2]                        the next layer of u0 starts once u0 is back and A is free
    F           [u0][u1][u2]
    f2a             [u0][u1][u2]

Several attention workers run in step: the FFN waits for the rows of the slowest. Must not know: where the times come from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from antiphon.planner.cost.formula import formula

FloatArray = npt.NDArray[np.float64]
STAGES = ("attention", "a2f", "ffn", "f2a")


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """Seconds of one layer for one ubatch."""

    attention_s: float
    a2f_s: float
    ffn_s: float
    f2a_s: float

    @property
    def round_s(self) -> float:
        """One ubatch through one layer, alone."""
        return self.attention_s + self.a2f_s + self.ffn_s + self.f2a_s

    @property
    def slowest_s(self) -> float:
        """The stage that bounds the rate."""
        return max(self.attention_s, self.a2f_s, self.ffn_s, self.f2a_s)

    @property
    def slowest(self) -> str:
        """Its name."""
        return STAGES[int(np.argmax((self.attention_s, self.a2f_s, self.ffn_s, self.f2a_s)))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One ubatch in one stage, for the picture; ``worker`` counts attention workers and is 0 elsewhere."""

    stage: str
    worker: int
    layer: int
    ubatch: int
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineRun:
    """One simulated step."""

    step_s: float
    finish_s: tuple[float, ...]  # by ubatch
    segments: tuple[Segment, ...]

    def busy_share(self, stage: str, worker: int = 0) -> float:
        """Share of the step in which a stage works; the rest is bubble."""
        busy = sum(s.end_s - s.start_s for s in self.segments if s.stage == stage and s.worker == worker)
        return busy / self.step_s


def simulate(
    attention_s: FloatArray, a2f_s: FloatArray, ffn_s: FloatArray, f2a_s: FloatArray, *, keep_segments: bool = False
) -> PipelineRun:
    """One step, exactly.

    Args:
        attention_s: Seconds by [worker, layer, ubatch].
        a2f_s: Seconds by [worker, layer, ubatch]; each worker has its own link.
        ffn_s: Seconds by [layer, ubatch].
        f2a_s: Seconds by [worker, layer, ubatch].
        keep_segments: Keep what the picture needs.
    """
    num_workers, num_layers, num_ubatches = attention_s.shape
    attention_free = np.zeros(num_workers)
    out_free, back_free = np.zeros(num_workers), np.zeros(num_workers)
    back = np.zeros((num_ubatches, num_workers))
    ffn_free = 0.0
    segments: list[Segment] = []

    def keep(stage: str, starts: FloatArray, ends: FloatArray, layer: int, ubatch: int) -> None:
        segments.extend(
            Segment(stage=stage, worker=w, layer=layer, ubatch=ubatch, start_s=float(s), end_s=float(e))
            for w, (s, e) in enumerate(zip(starts, ends, strict=True))
        )

    for layer in range(num_layers):
        for ubatch in range(num_ubatches):
            start = np.maximum(attention_free, back[ubatch])
            attention_free = start + attention_s[:, layer, ubatch]
            out_start = np.maximum(attention_free, out_free)
            out_free = out_start + a2f_s[:, layer, ubatch]
            ffn_start = max(float(out_free.max()), ffn_free)
            ffn_free = ffn_start + float(ffn_s[layer, ubatch])
            back_start = np.maximum(ffn_free, back_free)
            back_free = back_start + f2a_s[:, layer, ubatch]
            back[ubatch] = back_free
            if keep_segments:
                keep("attention", start, attention_free, layer, ubatch)
                keep("a2f", out_start, out_free, layer, ubatch)
                keep("ffn", np.array([ffn_start]), np.array([ffn_free]), layer, ubatch)
                keep("f2a", back_start, back_free, layer, ubatch)
    finish = back.max(axis=1)
    return PipelineRun(step_s=float(finish.max()), finish_s=tuple(float(t) for t in finish), segments=tuple(segments))


def simulate_layers(
    layers: Sequence[StageTimes],
    num_ubatches: int,
    *,
    num_workers: int = 1,
    variation: float = 0.0,
    slowdowns: Sequence[float] = (),
    seed: int = 0,
    keep_segments: bool = False,
) -> PipelineRun:
    """One step from each layer's mean times.

    Args:
        layers: Mean times, in layer order.
        num_ubatches: Ubatches in flight.
        num_workers: Attention workers that run in step.
        variation: Standard deviation of every stage's time over its mean (gamma distributed).
        slowdowns: Factor on the attention times of each worker, for stragglers; missing ones are 1.
        seed: Of the random times.
        keep_segments: Keep what the picture needs.
    """
    rng = np.random.default_rng(seed)
    size = (num_workers, len(layers), num_ubatches)

    def drawn(means: Sequence[float], shape: tuple[int, ...]) -> FloatArray:
        column = np.asarray(means, dtype=np.float64)[:, None]
        if variation == 0:
            return np.broadcast_to(column, shape).copy()
        return column * rng.gamma(1 / variation**2, variation**2, size=shape)

    attention = drawn([times.attention_s for times in layers], size)
    for worker, factor in enumerate(slowdowns):
        attention[worker] *= factor
    return simulate(
        attention,
        drawn([times.a2f_s for times in layers], size),
        drawn([times.ffn_s for times in layers], size[1:]),
        drawn([times.f2a_s for times in layers], size),
        keep_segments=keep_segments,
    )


@formula("s", round_s="s", slowest_s="s", num_layers="", num_ubatches="")
def uniform_step_s(*, round_s: float, slowest_s: float, num_layers: float, num_ubatches: float) -> float:
    """A step of equal layers: one round, then per layer the slower of a round and all ubatches in the slowest stage."""
    return round_s + (num_layers - 1) * max(num_ubatches * slowest_s, round_s) + (num_ubatches - 1) * slowest_s


@formula("", attention_s="s", ffn_s="s", link_s="s")
def ubatches_to_hide(*, attention_s: float, ffn_s: float, link_s: float) -> float:
    """Ubatches from which the slower half never waits; 2 (1 + T_c / T_f) when the halves are equal."""
    return (attention_s + ffn_s + 2 * link_s) / max(attention_s, ffn_s)


def step_s(kinds: Sequence[tuple[StageTimes, int]], num_ubatches: int) -> float:
    """A step over layers of several kinds, given with their counts; exact for one kind, within a round for more.

    Every layer takes the slower of a round and of all ubatches in its slowest stage; the last one ends when its last ubatch
    is back.
    """
    total, last = 0.0, kinds[-1][0]
    for times, count in kinds:
        total += count * max(num_ubatches * times.slowest_s, times.round_s)
    return total - max(num_ubatches * last.slowest_s - last.round_s, 0.0) + (num_ubatches - 1) * last.slowest_s


def min_ubatches(times: StageTimes) -> int:
    """Fewest ubatches that keep the slowest stage always busy."""
    if times.slowest_s == 0:
        return 1
    return max(1, math.ceil(times.round_s / times.slowest_s - 1e-9))
