"""Health, queues and residency of a composition's experts, as the whole cluster sees them (control speed; reading is free).

    worker records of the directory ──► experts of ours ─┐
    own circuits and counts ─► note ─► notes of all ─────┴─► view()

Every gateway writes what it knows of the experts into the directory and reads what the others wrote, so that routers which keep
nothing of their own decide alike. Must not know: how a decision is made, HTTP. Belongs to one event loop.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from antiphon.coe.routing.decision import Decision, ExpertState, View
from antiphon.coe.serving.circuit_breaker import Breaker
from antiphon.coe.tiers.forecast import Forecast, shares_of
from antiphon.core.directory import Notes
from antiphon.core.document.coe.experts import ExternalEndpoint
from antiphon.core.document.composition import CompositionOfExperts
from antiphon.core.errors import AntiphonError
from antiphon.core.text.json_text import read_json_text
from antiphon.core.worker_info import WorkerInfo

_log = logging.getLogger(__name__)

TURN_S = 1.0  # nominal time in which a running request makes room for a waiting one
REPORT_LEASE_S = 3.0  # what a gateway that is gone has said holds so long

# Gauges of a worker that holds its model in a slower tier until it is asked for.
RESIDENT_GAUGE = "resident"  # 0 = not in fast memory
LOAD_GAUGE = "load_s"  # until it would be


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What one gateway knows of the experts it asks."""

    open: frozenset[str] = frozenset()  # experts it leaves alone for now
    running: Mapping[str, int] = field(default_factory=dict)  # its requests at each
    expected: Mapping[str, float] = field(default_factory=dict)  # requests per second at each that its decisions let expect

    def to_json(self) -> str:
        """The note's text."""
        value: dict[str, object] = {"open": sorted(self.open), "running": dict(sorted(self.running.items()))}
        if self.expected:
            value["expected"] = {name: round(rate, 6) for name, rate in sorted(self.expected.items())}
        return json.dumps(value, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report of a note; what can't be read says nothing."""
        try:
            value = read_json_text(text)
            return cls(
                open=frozenset(map(str, value["open"])),
                running={str(k): int(n) for k, n in value["running"].items()},
                expected={str(k): float(rate) for k, rate in value.get("expected", {}).items()},
            )
        except (ValueError, TypeError, KeyError, AttributeError):
            return cls()


def experts_topic(composition: str) -> str:
    """Where the gateways of a composition note their reports."""
    return f"coe/{composition}/experts"


class ExpertHealth:
    """The state of one composition's experts.

    Args:
        document: the composition.
        models: served model name of each expert that is ours, by expert.
        endpoints: experts that are ours but reached at another gateway, by expert.
        workers: what the directory lists now.
        notes: where gateways tell each other what they know.
        owner: unique name of this gateway; "" = a router, which only reads.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        document: CompositionOfExperts,
        *,
        models: Mapping[str, str],
        endpoints: Mapping[str, ExternalEndpoint],
        workers: Callable[[], Iterable[WorkerInfo]],
        notes: Notes,
        owner: str,
        clock: Callable[[], float],
    ) -> None:
        self._document = document
        self._models = models
        self._endpoints = endpoints
        self._workers = workers
        self._notes = notes
        self._owner = owner
        self._topic = experts_topic(document.metadata.name)
        self._clock = clock
        self._forecast = None if document.spec.tiers is None else Forecast()
        self._others: dict[str, Report] = {}
        self._reachable = True
        limits = document.spec.limits
        self.breakers = {e.name: Breaker(limits.breaker_failures, limits.breaker_open_s, clock) for e in document.spec.experts}
        self.num_running = dict.fromkeys(self.breakers, 0)

    def model_of(self, expert: str) -> str:
        """The served model behind an expert of ours."""
        return self._models[expert]

    def external(self, expert: str) -> ExternalEndpoint | None:
        """The endpoint of an expert that another process answers for, or None when this gateway does."""
        return self._endpoints.get(expert, self._document.spec.expert(expert).external)

    @property
    def avoided(self) -> frozenset[str]:
        """Experts whose circuit is open here."""
        return frozenset(name for name, breaker in self.breakers.items() if breaker.is_open)

    def view(self, avoided: Iterable[str] = ()) -> View:
        """State of every expert now; ``avoided`` ones count as down. Equal states give an equal version, on every replica."""
        workers = list(self._workers())
        down = {*avoided, *self.avoided, *(name for report in self._others.values() for name in report.open)}
        states = {}
        for expert in self._document.spec.experts:
            if expert.name in down:
                states[expert.name] = ExpertState(healthy=False)
            elif self.external(expert.name) is not None:
                states[expert.name] = self._state_elsewhere(expert.name)
            else:
                states[expert.name] = state_of(self._models[expert.name], workers)
        return View(experts=states, version=zlib.crc32(repr(sorted(states.items())).encode()))

    def expect(self, decision: Decision) -> None:
        """A request was routed: experts that share memory are told what to expect next."""
        if self._forecast is not None:
            self._forecast.observe(shares_of(decision), self._clock())

    async def refresh(self) -> None:
        """Say what this gateway knows and read what the others do; while the directory is silent the last word stands."""
        try:
            if self._owner:
                expected = {} if self._forecast is None else self._forecast.expected(self._clock())
                mine = Report(open=self.avoided, running={name: n for name, n in self.num_running.items() if n}, expected=expected)
                await self._notes.put_note(self._topic, self._owner, mine.to_json(), REPORT_LEASE_S)
            found = await self._notes.notes(self._topic)
        except AntiphonError as error:
            if self._reachable:
                _log.warning("%s: what other gateways know can't be read: %s", self._topic, error)
            self._reachable = False
            return
        self._reachable = True
        self._others = {owner: Report.from_json(text) for owner, text in found.items() if owner != self._owner}

    def _state_elsewhere(self, expert: str) -> ExpertState:
        num_slots = self._document.spec.limits.max_concurrent_per_expert
        num_requests = self.num_running[expert] + sum(report.running.get(expert, 0) for report in self._others.values())
        num_waiting = max(0, num_requests - num_slots)
        return ExpertState(num_waiting=num_waiting, expected_wait_s=TURN_S * num_waiting / num_slots)


def state_of(model: str, workers: Iterable[WorkerInfo]) -> ExpertState:
    """The state of a served model from its workers' records."""
    able = [w for w in workers if w.model == model and w.role.generates and w.ready and not w.draining]
    if not able:
        return ExpertState(healthy=False)
    num_waiting = sum(worker.load.num_waiting for worker in able)
    num_slots = sum(max(1, worker.max_num_seqs) for worker in able)
    return ExpertState(
        resident=any(worker.load.gauges.get(RESIDENT_GAUGE, 1.0) > 0 for worker in able),
        num_waiting=num_waiting,
        expected_wait_s=TURN_S * num_waiting / num_slots,
        load_s=min(worker.load.gauges.get(LOAD_GAUGE, 0.0) for worker in able),
    )
