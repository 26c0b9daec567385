"""Puts workers' traces of steps on one time line without synchronised clocks, as Chrome/Perfetto JSON (control speed).

Each side stamps its own clock. What both took part in ties the clocks: rows can't arrive before they were sent, nor can an answer
before it was computed, so every exchange bounds the offset between two clocks from both sides:

    attention   ──send──┐                   ┌──receive──►        offset = FFN clock - attention clock
                        └──►rows──compute──►┘                    computed - received  <=  offset  <=  arrived - sent

The tightest bounds over all exchanges leave the offset a few microseconds, whose middle is taken. Where they contradict each other
the clocks drift, and a line through the middles of both halves of the trace takes its place. Workers that share no exchange are
tied through those that share one with both. Must not know: how events are collected.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from antiphon.telemetry.step_trace import Event, Mark, WorkerTrace

LOOP = 1  # thread ids within a process of the picture
_MIN_EXCHANGES_TO_DRIFT = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """One exchange as both sides saw it, each on its own clock."""

    sent_s: float
    received_s: float
    arrived_s: float
    computed_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockMap:
    """A worker's clock seen from the reference: reference = own - offset_s - drift * (own - origin_s)."""

    offset_s: float
    drift: float = 0.0
    origin_s: float = 0.0
    uncertainty_s: float = 0.0  # half of what the bounds leave open, summed on the way to the reference

    def to_reference(self, own_s: float) -> float:
        """The reference clock's time."""
        return own_s - self.offset_s - self.drift * (own_s - self.origin_s)


def exchanges(attention: WorkerTrace, ffn: WorkerTrace) -> list[Exchange]:
    """Exchanges that both traces hold, in the order they were sent; of rows sent twice, the last."""
    rows = {event.exchange: event for event in ffn.events if event.mark is Mark.ROWS and event.peer == attention.worker}
    sent = {event.exchange: event for event in attention.events if event.mark is Mark.SEND}
    return [
        Exchange(
            sent_s=sent[event.exchange].start_s,
            received_s=event.end_s,
            arrived_s=rows[event.exchange].start_s,
            computed_s=rows[event.exchange].end_s,
        )
        for event in attention.events
        if event.mark is Mark.RECEIVE and event.exchange in sent and event.exchange in rows
    ]


def tie(found: Sequence[Exchange]) -> ClockMap:
    """The FFN worker's clock as seen from the attention worker's.

    Raises:
        ValueError: there is no exchange.
    """
    if not found:
        raise ValueError("clocks without a common exchange can't be tied")
    low, high = _bounds(found)
    if low <= high or len(found) < _MIN_EXCHANGES_TO_DRIFT:
        return ClockMap(offset_s=(low + high) / 2, uncertainty_s=abs(high - low) / 2)
    halves = found[: len(found) // 2], found[len(found) // 2 :]
    (at_a, mid_a), (at_b, mid_b) = ((sum(e.arrived_s for e in half) / len(half), sum(_bounds(half)) / 2) for half in halves)
    drift = (mid_b - mid_a) / (at_b - at_a)
    flat = [
        Exchange(
            sent_s=e.sent_s,
            received_s=e.received_s,
            arrived_s=e.arrived_s - drift * (e.arrived_s - at_a),
            computed_s=e.computed_s - drift * (e.computed_s - at_a),
        )
        for e in found
    ]
    low, high = _bounds(flat)
    return ClockMap(offset_s=(low + high) / 2, drift=drift, origin_s=at_a, uncertainty_s=abs(high - low) / 2)


def _bounds(found: Sequence[Exchange]) -> tuple[float, float]:
    return max(e.computed_s - e.received_s for e in found), min(e.arrived_s - e.sent_s for e in found)


def align(traces: Sequence[WorkerTrace]) -> dict[str, ClockMap]:
    """Every worker's clock as seen from the first attention worker's; those that nothing ties to it are left out."""
    attention = [trace for trace in traces if any(event.mark is Mark.STEP for event in trace.events)]
    others = [trace for trace in traces if trace not in attention]
    if not attention:
        return {trace.worker: ClockMap(offset_s=0.0) for trace in traces[:1]}
    known = {attention[0].worker: ClockMap(offset_s=0.0)}
    grown = True
    while grown:
        grown = False
        for near in attention:
            for far in others:
                if (near.worker in known) == (far.worker in known):
                    continue
                shared = exchanges(near, far)
                if not shared:
                    continue
                step = tie(shared)
                if near.worker in known:
                    known[far.worker] = _after(known[near.worker], step)
                else:
                    known[near.worker] = _before(known[far.worker], step)
                grown = True
    return known


def _after(first: ClockMap, then: ClockMap) -> ClockMap:
    """From a worker tied by ``then`` to one tied by ``first``; products of two drifts are below any clock's resolution."""
    return ClockMap(
        offset_s=then.offset_s + first.offset_s + first.drift * (then.origin_s - then.offset_s - first.origin_s),
        drift=then.drift + first.drift,
        origin_s=then.origin_s,
        uncertainty_s=first.uncertainty_s + then.uncertainty_s,
    )


def _before(far: ClockMap, step: ClockMap) -> ClockMap:
    """Of an attention worker, given its FFN worker's map and what ties the two."""
    back = ClockMap(
        offset_s=-step.offset_s, drift=-step.drift, origin_s=step.origin_s - step.offset_s, uncertainty_s=step.uncertainty_s
    )
    return _after(far, back)


def chrome(traces: Sequence[WorkerTrace]) -> dict[str, Any]:
    """The JSON object that chrome://tracing and ui.perfetto.dev open.

    A process a worker; its loop is a track, rows that are away (attention) or waiting (FFN) are tracks of their own; arrows lead
    from send to compute to receive. Times are microseconds from the first event.
    """
    clocks = align(traces)
    shown = [trace for trace in traces if trace.worker in clocks and trace.events]
    start_s = min((clocks[t.worker].to_reference(e.start_s) for t in shown for e in t.events), default=0.0)
    out: list[dict[str, Any]] = []
    places = {
        trace.worker: _Place(pid=number, clock=clocks[trace.worker], start_s=start_s) for number, trace in enumerate(shown, 1)
    }
    for trace in shown:
        out += _named(trace, places[trace.worker].pid)
        for event in trace.events:
            out += places[trace.worker].shown(event)
    out += _arrows(shown, places)
    out.sort(key=lambda each: (each["ph"] != "M", each.get("ts", 0.0)))
    return {
        "traceEvents": out,
        "displayTimeUnit": "ms",
        "otherData": {
            "clocks": {
                name: {
                    "offset_us": round(1e6 * clock.offset_s, 3),
                    "uncertainty_us": round(1e6 * clock.uncertainty_s, 3),
                    "drift_ppm": round(1e6 * clock.drift, 3),
                }
                for name, clock in clocks.items()
            },
            "left_out": [trace.worker for trace in traces if trace not in shown],
        },
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where a worker's events go in the picture."""

    pid: int
    clock: ClockMap
    start_s: float

    def at_us(self, own_s: float) -> float:
        return round(1e6 * (self.clock.to_reference(own_s) - self.start_s), 3)

    def shown(self, event: Event) -> Iterator[dict[str, Any]]:
        start_us, end_us = self.at_us(event.start_s), self.at_us(event.end_s)
        facts = {"step": event.step, "layer": event.layer, "ubatch": event.ubatch, "rows": event.rows}
        where = {"pid": self.pid, "tid": LOOP, "cat": str(event.mark)}
        match event.mark:
            case Mark.STEP:
                yield {
                    "ph": "X",
                    "name": f"step {event.step}",
                    "ts": start_us,
                    "dur": round(end_us - start_us, 3),
                    **where,
                    "args": facts,
                }
            case Mark.ROWS:
                name = f"rows of {event.peer}, ubatch {event.ubatch}"
                yield from self._apart(name, start_us, end_us, event, {**facts, "peer": event.peer})
            case _:
                name = f"{event.mark} L{event.layer} u{event.ubatch}" if event.mark is not Mark.SAMPLE else "head and sampler"
                yield {"ph": "X", "name": name, "ts": start_us, "dur": round(end_us - start_us, 3), **where, "args": facts}

    def _apart(self, name: str, start_us: float, end_us: float, event: Event, facts: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """A track of its own: what may overlap with others."""
        key = f"{self.pid}.{event.peer}.{event.ubatch}.{event.step}.{event.layer}"
        common = {"cat": "away", "id": key, "pid": self.pid, "tid": LOOP, "name": name}
        yield {"ph": "b", "ts": start_us, **common, "args": facts}
        yield {"ph": "e", "ts": end_us, **common}

    def away(self, sent: Event, received: Event) -> Iterator[dict[str, Any]]:
        facts = {"step": sent.step, "layer": sent.layer, "rows": sent.rows}
        return self._apart(f"ubatch {sent.ubatch} away", self.at_us(sent.start_s), self.at_us(received.end_s), sent, facts)


def _named(trace: WorkerTrace, pid: int) -> list[dict[str, Any]]:
    return [
        {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": f"{trace.worker} ({trace.role}, pid {trace.pid})"}},
        {"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}},
        {"ph": "M", "name": "thread_name", "pid": pid, "tid": LOOP, "args": {"name": "loop"}},
    ]


def _arrows(traces: Iterable[WorkerTrace], places: Mapping[str, _Place]) -> Iterator[dict[str, Any]]:
    traces = list(traces)
    number = 0
    for near in traces:
        sent = {event.exchange: event for event in near.events if event.mark is Mark.SEND}
        received = {event.exchange: event for event in near.events if event.mark is Mark.RECEIVE}
        here = places[near.worker]
        for exchange, receive in received.items():
            if exchange in sent:
                yield from here.away(sent[exchange], receive)
        for far in traces:
            there = places[far.worker]
            batches = _batches(far)
            for rows in far.events:
                if rows.mark is not Mark.ROWS or rows.peer != near.worker or rows.exchange not in sent:
                    continue
                if rows.exchange not in received or (rows.layer, rows.end_s) not in batches:
                    continue
                number += 1
                send, receive, batch = sent[rows.exchange], received[rows.exchange], batches[rows.layer, rows.end_s]
                common = {"cat": "exchange", "name": f"L{rows.layer} u{rows.ubatch}", "id": number, "tid": LOOP}
                # Each end of an arrow must lie within the slice it belongs to.
                yield {"ph": "s", "ts": here.at_us(send.start_s), "pid": here.pid, **common}
                yield {"ph": "t", "ts": there.at_us(batch.start_s), "pid": there.pid, **common}
                yield {"ph": "f", "bp": "e", "ts": here.at_us(receive.end_s) - 0.001, "pid": here.pid, **common}


def _batches(trace: WorkerTrace) -> dict[tuple[int, float], Event]:
    """Batches by layer and by the moment they were computed, which is when the wait of their rows ends."""
    found: dict[tuple[int, float], Event] = {}
    pending: list[Event] = []
    for event in trace.events:
        if event.mark is Mark.ROWS:
            pending.append(event)
        elif event.mark is Mark.COMPUTE:
            found |= {(rows.layer, rows.end_s): event for rows in pending if rows.layer == event.layer}
            pending.clear()
    return found
