"""Log lines: their fields, where the fields come from, and that nobody can forge a line."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from antiphon.telemetry import configure_logging, log_context
from antiphon.telemetry.logs import JsonFormatter, TextFormatter

log = logging.getLogger("antiphon.test")


@pytest.fixture
def out() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    own = logging.getLogger("antiphon").level
    yield io.StringIO()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("antiphon").setLevel(own)


def lines(out: io.StringIO) -> list[dict[str, Any]]:
    # Threads that earlier tests of this process left running may log too.
    return [line for text in out.getvalue().splitlines() if (line := json.loads(text))["logger"].startswith("antiphon.test")]


def test_a_line_is_one_json_object_with_its_process_and_request(out: io.StringIO) -> None:
    configure_logging("info", worker="demo/ffn/0", generation=3, stream=out)
    with log_context(request_id="r1", trace_id="abc"):
        log.info("took %d rows", 4)
    (line,) = lines(out)
    assert line.pop("ts").endswith("Z")
    assert line == {
        "level": "info",
        "logger": "antiphon.test",
        "message": "took 4 rows",
        "worker": "demo/ffn/0",
        "generation": 3,
        "request_id": "r1",
        "trace_id": "abc",
    }


def test_fields_end_with_their_context(out: io.StringIO) -> None:
    configure_logging(stream=out)
    with log_context(request_id="r1"):
        with log_context(worker="w"):
            log.info("inner")
        log.info("outer")
    log.info("none")
    assert [(line.get("request_id"), line.get("worker")) for line in lines(out)] == [
        ("r1", "w"),
        ("r1", None),
        (None, None),
    ]


async def test_tasks_do_not_see_each_others_request(out: io.StringIO) -> None:
    configure_logging(stream=out)

    async def one(request_id: str) -> None:
        with log_context(request_id=request_id):
            await asyncio.sleep(0)
            log.info(request_id)

    await asyncio.gather(*(one(f"r{i}") for i in range(5)))
    assert all(line["message"] == line["request_id"] for line in lines(out))


def test_an_exception_is_part_of_its_line(out: io.StringIO) -> None:
    configure_logging(stream=out)
    try:
        raise ValueError("broken")
    except ValueError:
        log.exception("failed", extra={"layer": 3})
    (line,) = lines(out)
    assert line["layer"] == 3
    assert line["error"].endswith("ValueError: broken")


def test_a_clients_newline_forges_no_line(out: io.StringIO) -> None:
    configure_logging(json=False, stream=out)
    with log_context(request_id="r1\n12:00:00 ERROR forged"):
        log.info("hello\x1b[31m")
    (line,) = out.getvalue().splitlines()
    assert "r1\\n12:00:00" in line
    assert "\x1b" not in line


def test_configuring_again_replaces_the_handler(out: io.StringIO) -> None:
    configure_logging(stream=io.StringIO())
    configure_logging(stream=out)
    log.info("once")
    assert len(lines(out)) == 1


def test_the_level_is_for_our_own_loggers(out: io.StringIO) -> None:
    configure_logging("debug", stream=out)
    log.debug("ours")
    logging.getLogger("some.library").info("theirs")
    assert [line["message"] for line in lines(out)] == ["ours"]


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="not a log level"):
        configure_logging("loud")


def test_private_fields_that_libraries_add_are_left_out(out: io.StringIO) -> None:
    configure_logging("info", stream=out)
    log.info("hello", extra={"_stamped_by_a_library_ns": 1, "rows": 2})
    (line,) = lines(out)
    assert line["rows"] == 2
    assert "_stamped_by_a_library_ns" not in line


def test_an_error_that_quotes_a_client_forges_no_line() -> None:
    forged = "2026-01-01T00:00:00Z ERROR forged"
    try:
        raise ValueError(f"x\n{forged}\r{forged}\u2028{forged}\x1b[2J")
    except ValueError as error:
        info = (type(error), error, error.__traceback__)
    record = logging.LogRecord("a", logging.ERROR, "f", 1, "failed: %s", (f"y\n{forged}\u2028{forged}",), info)
    for line in TextFormatter({}).format(record).splitlines():
        assert not line.startswith(forged)
        assert line.isprintable()
    (line,) = JsonFormatter({}).format(record).splitlines()
    assert json.loads(line)["message"] == f"failed: y\n{forged}\u2028{forged}"
