"""What one worker did in real steps, stamped by its own clock: off unless asked for (hot while it records).

    ANTIPHON_STEP_TRACE=DIR      in a worker's environment: it leaves DIR/<worker>.<epoch>.steps.json when it ends
    POST /trace at a gateway     records for a moment, and shows one step

Events are kept in a ring, the latest ``CAPACITY`` of them. An attention worker's exchange and an FFN worker's answer are named by
the same (step, layer, ubatch), so that ``step_timeline`` finds the pairs. Must not know: other workers' clocks, pictures.
"""

from __future__ import annotations

import enum
import json
import math
import os
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

VARIABLE = "ANTIPHON_STEP_TRACE"
SUFFIX = ".steps.json"
CAPACITY = 400_000  # events; about 40 MB of memory, some hundred steps of a large model


class Mark(enum.StrEnum):
    """What an event is. The worker's loop does one thing at a time, so events of one kind never overlap, but ROWS."""

    STEP = "step"  # attention: a forward pass
    ATTEND = "attend"  # attention: attention half of (layer, ubatch)
    SEND = "send"  # attention: from the exchange's start to its rows being committed
    RECEIVE = "receive"  # attention: waiting for the partial sums and taking them
    COMBINE = "combine"  # attention: adding the result
    SAMPLE = "sample"  # attention: head and sampler
    ROWS = "rows"  # FFN: rows of one peer, from arrival to their answer being computed
    COMPUTE = "compute"  # FFN: one batch, from the start to the last answer being sent


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something a worker did from ``start_s`` to ``end_s`` on its own clock."""

    mark: Mark
    start_s: float
    end_s: float
    step: int = 0
    layer: int = 0
    ubatch: int = 0
    rows: int = 0
    peer: str = ""  # ROWS: the attention worker they came from

    @property
    def exchange(self) -> tuple[int, int, int]:
        """What both sides call the same."""
        return self.step, self.layer, self.ubatch


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerTrace:
    """All events of one worker."""

    worker: str
    role: str
    pid: int
    events: tuple[Event, ...]


class StepTrace:
    """Collects one worker's events; belongs to its loop."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        # Plain tuples: what they hold is atomic, so the garbage collector does not look at them again.
        self._events: deque[tuple[Mark, float, float, int, int, int, int, str]] = deque(maxlen=capacity)

    def add(
        self,
        mark: Mark,
        start_s: float,
        end_s: float,
        step: int = 0,
        layer: int = 0,
        ubatch: int = 0,
        rows: int = 0,
        peer: str = "",
    ) -> None:
        """Keep one event; the fields are those of ``Event``."""
        self._events.append((mark, start_s, end_s, step, layer, ubatch, rows, peer))

    def taken(self, *, worker: str, role: str, since_s: float = -math.inf, max_events: int = CAPACITY) -> WorkerTrace:
        """What was collected from ``since_s`` on, oldest first, at most the latest ``max_events``. Any thread may call."""
        kept = [event for event in self._events.copy() if event[1] >= since_s][-max_events:]
        events = tuple(
            Event(mark=mark, start_s=start_s, end_s=end_s, step=step, layer=layer, ubatch=ubatch, rows=rows, peer=peer)
            for mark, start_s, end_s, step, layer, ubatch, rows, peer in kept
        )
        return WorkerTrace(worker=worker, role=role, pid=os.getpid(), events=events)


def clock() -> float:
    """The clock of all events: this process's own, monotonic, with an origin of its own."""
    return time.perf_counter()


def asked_for(environment: Mapping[str, str] = os.environ) -> Path | None:
    """The directory that traces should be left in; None = nobody wants any."""
    value = environment.get(VARIABLE, "").strip()
    return Path(value) if value else None


def save(trace: WorkerTrace, directory: Path, epoch: int) -> Path:
    """Write ``trace`` into ``directory``, which is made if need be; the file."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{trace.worker.replace('/', '_')}.{epoch}{SUFFIX}"
    half = path.with_suffix(".part")
    half.write_text(json.dumps(asdict(trace)))
    half.rename(path)
    return path


def load(directory: Path) -> list[WorkerTrace]:
    """Every trace in ``directory``, by name of file.

    Raises:
        ValueError: a file there is none.
    """
    found = []
    for path in sorted(directory.glob(f"*{SUFFIX}")):
        try:
            raw = json.loads(path.read_text())
            events = tuple(Event(**{**event, "mark": Mark(event["mark"])}) for event in raw["events"])
            found.append(WorkerTrace(worker=raw["worker"], role=raw["role"], pid=raw["pid"], events=events))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is no trace of steps: {error!r}") from error
    return found
