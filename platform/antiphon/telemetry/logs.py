"""Structured logs: JSON for machines, readable for terminals; each line says who and for which request (request speed).

Modules log through ``logging.getLogger(__name__)`` and know nothing of this. ``worker`` and ``generation`` (the
worker's epoch) belong to the process and are given once; ``request_id`` and ``trace_id`` belong to the task and come
from ``log_context``.

Must not know: what is logged.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TextIO

_fields: ContextVar[Mapping[str, str | int]] = ContextVar("antiphon_log_fields", default={})  # noqa: B039 - never changed in place
_OWN_LOGGERS = ("antiphon", "antiphon_operator")
_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


@contextmanager
def log_context(
    *,
    request_id: str | None = None,
    worker: str | None = None,
    generation: int | None = None,
    trace_id: str | None = None,
) -> Iterator[None]:
    """Add these fields to every line logged inside, by this task and those it starts; None leaves a field as it is."""
    given = {"request_id": request_id, "worker": worker, "generation": generation, "trace_id": trace_id}
    token = _fields.set({**_fields.get(), **{key: value for key, value in given.items() if value is not None}})
    try:
        yield
    finally:
        _fields.reset(token)


def configure_logging(
    level: str = "info",
    *,
    json: bool | None = None,
    worker: str | None = None,
    generation: int | None = None,
    stream: TextIO | None = None,
) -> None:
    """Send the process's logs to ``stream``; calling again replaces what the last call set.

    Args:
        level: of our own loggers (debug, info, warning, error); libraries speak from warning on.
        json: JSON lines; None = unless the stream is a terminal.
        worker: this process's worker id, on every line.
        generation: its epoch, on every line.
        stream: where to; None = stderr.

    Raises:
        ValueError: ``level`` is not a level's name.
    """
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ValueError(f"{level!r} is not a log level")
    out = sys.stderr if stream is None else stream
    as_json = not out.isatty() if json is None else json
    process = {key: value for key, value in (("worker", worker), ("generation", generation)) if value is not None}
    handler = _Handler(out)
    handler.setFormatter(JsonFormatter(process) if as_json else TextFormatter(process))
    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h, _Handler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(max(number, logging.WARNING))
    for name in _OWN_LOGGERS:
        logging.getLogger(name).setLevel(number)


# Where some readers end a line, besides what JSON escapes by itself.
_LINE_ENDS = {ord(each): f"\\u{ord(each):04x}" for each in "\x7f\x85\u2028\u2029"}


class _Handler(logging.StreamHandler[TextIO]):
    """Marks the handler as ours, so that configuring again replaces it and no other."""


class JsonFormatter(logging.Formatter):
    """One JSON object per line: ts, level, logger, message, context fields, what ``extra`` brought, error."""

    def __init__(self, process: Mapping[str, str | int]) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line of JSON."""
        line: dict[str, object] = {
            "ts": _timestamp(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._process,
            **_fields.get(),
            **_extra(record),
        }
        if record.exc_info is not None and record.exc_info[0] is not None:
            line["error"] = "".join(traceback.format_exception(*record.exc_info)).rstrip()
        return json.dumps(line, default=str, ensure_ascii=False).translate(_LINE_ENDS)


class TextFormatter(logging.Formatter):
    """Readable lines: time, level, logger, message, fields.

    Control characters are escaped, since clients choose what stands in some fields.
    """

    def __init__(self, process: Mapping[str, str | int]) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line, and its traceback below."""
        fields = {**self._process, **_fields.get(), **_extra(record)}
        tail = "".join(f" {key}={_printable(str(value))}" for key, value in fields.items())
        head = f"{_timestamp(record)[11:23]} {record.levelname:<7} {record.name}: {_printable(record.getMessage())}"
        if record.exc_info is not None and record.exc_info[0] is not None:
            # Set in, so that no line of an error that quotes a client can pass for one of ours.
            lines = "".join(traceback.format_exception(*record.exc_info)).rstrip().split("\n")
            tail += "".join(f"\n  {_printable(line)}" for line in lines)
        return head + tail


def _timestamp(record: logging.LogRecord) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z"


def _extra(record: logging.LogRecord) -> dict[str, object]:
    # Libraries that hook into record making (Ray does) add private fields of their own.
    return {key: value for key, value in record.__dict__.items() if key not in _STANDARD and not key.startswith("_")}


def _printable(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
