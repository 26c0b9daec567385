"""What happened to the processes of a deployment on this machine: one file of JSON lines, written by many (control speed).

Supervisors and the gateway append, ``antiphon serve`` reads: how it knows who is ready, where, and how long each stage took.
Must not know: how to start anything.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from antiphon.apps.serve.host import open_private

EventKind = Literal["started", "loading", "stage", "ready", "exited", "failed"]
Fact = str | int | float

HOST = "host"  # subject of the stages that are no worker's

_FILE = "journal.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class EventLogEntry:
    """One thing that happened to process ``subject`` ("<pool>/<index>", or "gateway")."""

    kind: EventKind
    subject: str
    time_s: float  # unix time
    epoch: int = 0
    pid: int = 0
    stage: str = ""
    seconds: float = 0.0
    message: str = ""
    log: str = ""  # path of the process' log
    facts: Mapping[str, Fact] = field(default_factory=dict)


class EventLog:
    """The event log in ``run_dir``. Lines are appended in one write each, so that writers need no lock."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / _FILE

    def write(
        self,
        kind: EventKind,
        subject: str,
        *,
        epoch: int = 0,
        pid: int = 0,
        stage: str = "",
        seconds: float = 0.0,
        message: str = "",
        log: str = "",
        facts: Mapping[str, Fact] | None = None,
    ) -> None:
        """Append one entry, stamped with the present time."""
        entry = EventLogEntry(
            kind=kind,
            subject=subject,
            time_s=time.time(),
            epoch=epoch,
            pid=pid,
            stage=stage,
            seconds=seconds,
            message=message,
            log=log,
            facts=dict(facts or {}),
        )
        line = json.dumps(asdict(entry), separators=(",", ":")).encode() + b"\n"
        descriptor = open_private(self._path, append=True)
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Time the block as a stage of the host's own."""
        start = time.monotonic()
        yield
        self.write("stage", HOST, stage=stage, seconds=time.monotonic() - start)

    def read(self) -> list[EventLogEntry]:
        """All complete entries, oldest first."""
        try:
            lines = self._path.read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return []
        return [EventLogEntry(**json.loads(line)) for line in lines]
