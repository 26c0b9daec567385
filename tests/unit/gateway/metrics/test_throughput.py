"""The line about throughput: figures of one interval, and silence while nothing happens."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path

import pytest

from antiphon.apps.supervision.log_mirror import LogMirror
from antiphon.cli.serving.serve_view import ThroughputLines
from antiphon.gateway.metrics import throughput
from antiphon.gateway.metrics.throughput import Totals, between


def test_an_interval_has_its_rates() -> None:
    before = Totals(num_prompt_tokens=10, num_generation_tokens=5, num_requests=1, num_failed=1)
    now = Totals(num_prompt_tokens=110, num_generation_tokens=55, num_requests=3, num_failed=2)
    found = between(before, now, 10.0, active=4, workers=())
    assert (found.prompt_tokens_per_s, found.generation_tokens_per_s, found.requests_per_s) == (10.0, 5.0, 0.2)
    assert (found.failed, found.active) == (1, 4)


async def test_idle_intervals_are_left_out(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each interval's totals: busy twice, then idle for long.
    steps = [Totals(), Totals(num_requests=1), Totals(num_requests=2), *[Totals(num_requests=2)] * 50]
    taken = 0

    def totals() -> Totals:
        nonlocal taken
        taken += 1
        return steps[min(taken - 1, len(steps) - 1)]

    caplog.set_level(logging.INFO, logger=throughput.__name__)
    telling = asyncio.create_task(throughput.tell(totals, lambda: 0, lambda: (), interval_s=0.001))
    async with asyncio.timeout(20):
        while taken < 40:
            await asyncio.sleep(0.001)
    telling.cancel()
    assert [record.message for record in caplog.records] == ["throughput"] * 3  # and one that says it has come to rest


def test_the_console_reads_the_lines_as_they_come(tmp_path: Path) -> None:
    log = tmp_path / "gateway-1.log"
    fields = {
        "prompt_tokens_per_s": 1.5,
        "generation_tokens_per_s": 30.25,
        "requests_per_s": 0.5,
        "running": 2,
        "waiting": 1,
        "failed": 0,
        "kv_usage": 0.25,
    }
    line = json.dumps({"ts": "x", "message": "throughput", **fields})
    lines = ThroughputLines(lambda: [log])
    assert lines.new() == []
    log.write_text('{"message": "other"}\n' + line[:20])
    assert lines.new() == []
    with log.open("a") as file:
        file.write(line[20:] + "\n")
    expected = "prompt 1.5 tokens/s, generation 30.2 tokens/s, 0.50 requests/s, running 2, waiting 1, failed 0, KV cache 25%"
    assert lines.new() == [expected]
    assert lines.new() == []


def test_logs_are_copied_while_they_grow(tmp_path: Path) -> None:
    source, out = tmp_path / "gateway-1.log", tmp_path / "logs"
    mirror = LogMirror(lambda: {path.name: path for path in tmp_path.glob("*.log")}, out)
    mirror.sync()
    source.write_text("one\n")
    mirror.sync()
    assert (out / source.name).read_text() == "one\n"
    with source.open("a") as file:
        file.write("two\n")
    mirror.sync()
    assert (out / source.name).read_text() == "one\ntwo\n"
    (out / source.name).unlink()
    out.rmdir()
    mirror.sync()  # whatever the user does with the directory
