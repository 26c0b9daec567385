"""A simulated request, and the attention workers of one decode group in step (control speed).

Must not know: events, prefill, where service times come from.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Request:
    """One request; ``emitted`` tokens survive the loss of a worker."""

    index: int
    prompt: int
    output: int
    arrival_s: float
    emitted: int = 0
    first_s: float = -1.0
    finish_s: float = -1.0
    joined_step: int = 0
    group: int = -1
    worker: int = -1


class DecodeGroup:
    """x attention workers in step. Owned by the loop."""

    __slots__ = (
        "alive",
        "base",
        "busiest",
        "clock_s",
        "counts",
        "factor",
        "finishing",
        "free",
        "load",
        "step",
        "step_s",
        "version",
        "wake_step",
    )

    def __init__(self, num_workers: int) -> None:
        self.counts = [0] * num_workers
        self.base = [0] * num_workers  # cached tokens of worker w at step k: base[w] + counts[w] * k
        self.alive = [True] * num_workers
        self.free = [(0, w) for w in range(num_workers)]  # heap of (count, worker); stale entries are skipped
        self.finishing: list[tuple[int, int, Request]] = []  # (step, tie, request); stale ones are skipped
        self.clock_s = 0.0  # time of boundary ``step``; may lie ahead of now while a step runs
        self.step = 0
        self.step_s = 0.0
        self.version = 0
        self.wake_step = 0  # the step that the pending wake brings it to
        self.busiest = 0
        self.factor = 1.0
        self.load = 0
