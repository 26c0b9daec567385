"""One step of a running deployment on one time line: asks the workers to record for a moment, picks a step (control speed).

    POST /trace ─► every worker records for `seconds` ─► clocks tied by their exchanges ─► one step, with all that ran beside it

Must not know: HTTP, or how a picture looks.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from antiphon.core.errors import AntiphonError, InvalidInput, Overloaded
from antiphon.core.ids import Role
from antiphon.core.worker_info import WorkerInfo
from antiphon.rpc.steps import MAX_TRACE_S, MIN_TRACE_S, StepsCalls
from antiphon.telemetry.step_timeline import ClockMap, align
from antiphon.telemetry.step_trace import Event, Mark, WorkerTrace

_log = logging.getLogger(__name__)

MAX_WORKERS: Final = 64  # of one trace; a picture of more shows nobody anything
_USUAL_S: Final = 0.5
_ROLES: Final = (Role.ATTENTION.value, Role.MONOLITH.value, Role.DECODE.value, Role.PREFILL.value)  # whose step is shown first


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneEvent:
    """Something a worker did, in microseconds from the step's start. Those of other steps overlap this one."""

    mark: str
    start_us: float
    end_us: float
    step: int
    layer: int
    ubatch: int
    rows: int
    peer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """One worker during the step."""

    worker: str
    role: str
    uncertainty_us: float  # of its clock against the first lane's
    events: tuple[LaneEvent, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedStep:
    """A step, and everybody who took part."""

    worker: str
    step: int
    rows: int
    duration_us: float
    num_ubatches: int
    num_steps: int  # that were seen
    lanes: tuple[Lane, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """What came of asking; ``step`` is None when none was computed in that time."""

    seconds: float
    num_workers: int  # that answered
    silent: tuple[str, ...]  # workers that did not
    step: TracedStep | None


class GatewaySteps:
    """Asks workers for traces, one request at a time. Belongs to one event loop.

    Args:
        workers: the latest records' workers.
    """

    def __init__(self, workers: Callable[[], Sequence[WorkerInfo]]) -> None:
        self._workers = workers
        self._asking = False

    async def trace(self, deployment: str, seconds: float | None) -> Traced:
        """Record for ``seconds`` and show a step.

        Args:
            deployment: whose; "" = the first with workers.
            seconds: for how long; None = half a second, or longer where no step ended in that.

        Raises:
            InvalidInput: seconds out of range, no such deployment.
            Overloaded: another trace is being recorded.
        """
        if seconds is not None and not MIN_TRACE_S <= seconds <= MAX_TRACE_S:
            raise InvalidInput(f"expected {MIN_TRACE_S:g} to {MAX_TRACE_S:g}", "seconds")
        names = sorted({info.deployment for info in self._workers()})
        if not names or (deployment and deployment not in names):
            raise InvalidInput(f"no workers of it are registered; there are {', '.join(names) or 'none'}", "deployment")
        if self._asking:
            raise Overloaded("another trace is being recorded", retry_after_s=seconds or MAX_TRACE_S)
        self._asking = True
        try:
            name = deployment or names[0]
            if seconds is not None:
                return (await self._record(name, seconds))[0]
            found, began = await self._record(name, _USUAL_S)
            return found if found.step is not None or not began else (await self._record(name, MAX_TRACE_S))[0]
        finally:
            self._asking = False

    async def _record(self, deployment: str, seconds: float) -> tuple[Traced, bool]:
        """What was seen, and whether a step was under way."""
        asked = [info for info in self._workers() if info.deployment == deployment and info.ready][:MAX_WORKERS]
        found = await asyncio.gather(*(_ask(info, seconds) for info in asked))
        traces = [trace for trace in found if trace is not None]
        traced = Traced(
            seconds=seconds,
            num_workers=len(traces),
            silent=tuple(str(info.worker_id) for info, trace in zip(asked, found, strict=True) if trace is None),
            step=pick(traces),
        )
        return traced, any(trace.events for trace in traces)


async def _ask(info: WorkerInfo, seconds: float) -> WorkerTrace | None:
    calls = StepsCalls(info.endpoint.rpc)
    try:
        return await calls.trace_steps(seconds)
    except AntiphonError as error:  # another version's, or one that is just going away
        _log.debug("%s records no steps: %s", info.worker_id, error)
        return None
    finally:
        await calls.close()


def pick(traces: Sequence[WorkerTrace]) -> TracedStep | None:
    """The step of median length among those with the most ubatches in flight, FFN workers' rows included; None = there is none."""
    clocks = align(sorted(traces, key=lambda trace: _rank(trace.role)))
    ffn_rows = {(e.peer, e.step) for trace in traces for e in trace.events if e.mark is Mark.ROWS}
    ubatches = {
        (trace.worker, key): len({e.ubatch for e in events})
        for trace in traces
        for key, events in _by_step(trace, Mark.ATTEND).items()
    }
    candidates = [
        ((_rank(trace.role), (trace.worker, step.step) not in ffn_rows, -ubatches.get((trace.worker, step.step), 0)), trace, step)
        for trace in traces
        if trace.worker in clocks
        for step in trace.events
        if step.mark is Mark.STEP and trace.events[0].start_s <= step.start_s
    ]
    if not candidates:
        return None
    best = min(rank for rank, _, _ in candidates)
    alike = sorted(((t, s) for rank, t, s in candidates if rank == best), key=lambda each: each[1].end_s - each[1].start_s)
    trace, step = alike[len(alike) // 2]
    start_s, end_s = (clocks[trace.worker].to_reference(at) for at in (step.start_s, step.end_s))
    lanes = [_lane(each, clocks[each.worker], start_s, end_s) for each in traces if each.worker in clocks]
    return TracedStep(
        worker=trace.worker,
        step=step.step,
        rows=step.rows,
        duration_us=_us(end_s - start_s),
        num_ubatches=max(1, -best[2]),
        num_steps=len(candidates),
        lanes=tuple(sorted((lane for lane in lanes if lane.events), key=lambda lane: (_rank(lane.role), lane.worker))),
    )


def _by_step(trace: WorkerTrace, mark: Mark) -> Mapping[int, list[Event]]:
    found: dict[int, list[Event]] = {}
    for event in trace.events:
        if event.mark is mark:
            found.setdefault(event.step, []).append(event)
    return found


def _rank(role: str) -> int:
    return _ROLES.index(role) if role in _ROLES else len(_ROLES)


def _lane(trace: WorkerTrace, clock: ClockMap, start_s: float, end_s: float) -> Lane:
    events = []
    for event in trace.events:
        began_s, ended_s = clock.to_reference(event.start_s), clock.to_reference(event.end_s)
        if event.mark is Mark.STEP or ended_s <= start_s or began_s >= end_s:
            continue
        events.append(
            LaneEvent(
                mark=event.mark.value,
                start_us=_us(max(began_s, start_s) - start_s),
                end_us=_us(min(ended_s, end_s) - start_s),
                step=event.step,
                layer=event.layer,
                ubatch=event.ubatch,
                rows=event.rows,
                peer=event.peer,
            )
        )
    return Lane(worker=trace.worker, role=trace.role, uncertainty_us=_us(clock.uncertainty_s), events=tuple(events))


def _us(seconds: float) -> float:
    return round(1e6 * seconds, 1)
