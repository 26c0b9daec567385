"""Events of a worker's start, and the event log they end in."""

import json
import os
import threading
from pathlib import Path

import pytest

from antiphon.apps.process.events import EVENTS_VARIABLE, EventWriter, WorkerEvent
from antiphon.apps.supervision.event_log import EventLog
from antiphon.core.errors import CheckpointInvalid, CorruptMessage


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch):
    read, write = os.pipe()
    monkeypatch.setenv(EVENTS_VARIABLE, str(write))
    yield lambda: os.read(read, 65536).decode().splitlines()
    os.close(read)
    os.close(write)


def test_events_travel_as_one_line_each(written) -> None:
    events = EventWriter()
    events.stage("weights", 1.23456)
    events.ready(num_blocks=3, name="x")
    events.failed(CheckpointInvalid("no tensor\nq_proj"))
    assert [WorkerEvent.from_json(line) for line in written()] == [
        WorkerEvent(event="stage", name="weights", seconds=1.2346),
        WorkerEvent(event="ready", facts={"num_blocks": 3, "name": "x"}),
        WorkerEvent(event="failed", code="checkpoint_invalid", message="no tensor\nq_proj"),
    ]


def test_a_timed_block_is_a_stage(written) -> None:
    with EventWriter().timed("peers"):
        pass
    (event,) = [WorkerEvent.from_json(line) for line in written()]
    assert (event.event, event.name) == ("stage", "peers")


def test_an_error_without_words_is_named_by_its_type(written) -> None:
    EventWriter().failed(ZeroDivisionError())
    (event,) = [WorkerEvent.from_json(line) for line in written()]
    assert (event.code, event.message) == ("ZeroDivisionError", "ZeroDivisionError")


def test_a_supervisor_that_is_gone_does_not_fail_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    monkeypatch.setenv(EVENTS_VARIABLE, str(write))
    events = EventWriter()
    os.close(read)
    events.ready()  # raises BrokenPipeError unless that is meant
    os.close(write)


@pytest.mark.parametrize("line", ["", "text", "[]", '{"event": "other"}', '{"event": "stage", "colour": 1}', "3"])
def test_a_line_that_is_no_event_is_refused(line: str) -> None:
    with pytest.raises(CorruptMessage):
        WorkerEvent.from_json(line)


def test_the_journal_keeps_entries_of_many_writers_whole(tmp_path: Path) -> None:
    def write(number: int) -> None:
        for epoch in range(50):
            EventLog(tmp_path).write("ready", f"ffn/{number}", epoch=epoch, message="x" * 300)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    entries = EventLog(tmp_path).read()
    assert sorted((e.subject, e.epoch) for e in entries) == sorted((f"ffn/{n}", e) for n in range(4) for e in range(50))


def test_an_entry_that_is_still_being_written_is_left_for_later(tmp_path: Path) -> None:
    event_log = EventLog(tmp_path)
    assert event_log.read() == []
    event_log.write("started", "ffn/0")
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "ready"})[:-4])
    assert [entry.kind for entry in event_log.read()] == ["started"]
