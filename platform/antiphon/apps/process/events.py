"""What a worker process tells its supervisor while it starts: one line of JSON per event (control speed).

The lines travel on a pipe of their own, named by EVENTS_VARIABLE, so that nothing a library prints can be taken for
an event. Without that variable (a worker started by hand) they go to stdout.

    {"event": "loading", "facts": {"num_bytes": 1000, "total_bytes": 5000}}    read of the weights so far
    {"event": "stage", "name": "weights", "seconds": 1.25}      a part of the start is done
    {"event": "ready", "facts": {"num_blocks": 512}}            registered, and able to serve
    {"event": "failed", "code": "...", "message": "..."}        it will exit; the reason in one sentence

Must not know: who reads them.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Literal

from antiphon.core.errors import AntiphonError, CorruptMessage

EVENTS_VARIABLE = "ANTIPHON_EVENTS_FD"  # number of the inherited file descriptor to write events to


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerEvent:
    """One event; ``name`` and ``seconds`` belong to a stage, ``facts`` to ready and loading, ``code`` and ``message`` to failed."""

    event: Literal["loading", "stage", "ready", "failed"]
    name: str = ""
    seconds: float = 0.0
    facts: Mapping[str, str | int | float] = field(default_factory=dict)
    code: str = ""
    message: str = ""

    def to_json(self) -> str:
        """One line, without its newline."""
        match self.event:
            case "stage":
                value: dict[str, object] = {"event": "stage", "name": self.name, "seconds": round(self.seconds, 4)}
            case "ready" | "loading":
                value = {"event": self.event, "facts": dict(self.facts)}
            case "failed":
                value = {"event": "failed", "code": self.code, "message": self.message}
        return json.dumps(value)

    @classmethod
    def from_json(cls, line: str | bytes) -> WorkerEvent:
        """Parse one line.

        Raises:
            CorruptMessage: the line is no event.
        """
        try:
            event = cls(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise CorruptMessage("worker", f"not an event: {error}") from error
        if event.event not in ("loading", "stage", "ready", "failed"):
            raise CorruptMessage("worker", f"unknown event {event.event!r}")
        return event


class EventWriter:
    """The worker's end. Writing never fails the worker: a supervisor that is gone no longer needs to know."""

    def __init__(self) -> None:
        descriptor = os.environ.get(EVENTS_VARIABLE)
        self._file: IO[str] = sys.stdout if descriptor is None else os.fdopen(int(descriptor), "w", closefd=False)

    def stage(self, name: str, seconds: float) -> None:
        """A part of the start is done and took ``seconds``."""
        self._write(WorkerEvent(event="stage", name=name, seconds=seconds))

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Time the block as stage ``name``."""
        start = time.monotonic()
        yield
        self.stage(name, time.monotonic() - start)

    def loading(self, num_bytes: int, total_bytes: int | None) -> None:
        """So much of the weights is read; None = how much there is isn't known."""
        total = {} if total_bytes is None else {"total_bytes": total_bytes}
        self._write(WorkerEvent(event="loading", facts={"num_bytes": num_bytes, **total}))

    def ready(self, **facts: str | int | float) -> None:
        """Registered and able to serve; ``facts`` are shown to people (num_blocks, resident_weight_bytes, ...)."""
        self._write(WorkerEvent(event="ready", facts=facts))

    def failed(self, error: BaseException) -> None:
        """The worker will exit because of ``error``."""
        code = error.code if isinstance(error, AntiphonError) else type(error).__name__
        self._write(WorkerEvent(event="failed", code=code, message=str(error) or type(error).__name__))

    def _write(self, event: WorkerEvent) -> None:
        try:
            self._file.write(event.to_json() + "\n")
            self._file.flush()
        except OSError:
            return
