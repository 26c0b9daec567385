"""Experts that share memory in /metrics: who is resident, and what loading takes by stage (request speed).

Observed from the latest records when somebody scrapes; a worker that shares no memory shows none. Must not know: exporters, who
decides what is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from antiphon.core.worker_info import WorkerInfo
from antiphon.telemetry import CallbackOptions, Meter, Observation

Attributes = Callable[[WorkerInfo], Mapping[str, str]]
_Observer = Callable[[CallbackOptions], Iterable[Observation]]

_STAGES = {"load_evict_s": "evict", "load_read_s": "read", "load_convert_s": "convert", "load_ready_s": "ready"}


def observe_tiers(meter: Meter, workers: Callable[[], Sequence[WorkerInfo]], attributes: Attributes) -> None:
    """Make the instruments; see ``stage_metrics.observe_stages``."""

    def of(key: str) -> _Observer:
        def observe(_options: CallbackOptions) -> Iterable[Observation]:
            return [Observation(info.load.gauges[key], attributes(info)) for info in workers() if key in info.load.gauges]

        return observe

    def stages(_options: CallbackOptions) -> Iterable[Observation]:
        return [
            Observation(info.load.gauges[key], {**attributes(info), "stage": stage})
            for info in workers()
            for key, stage in _STAGES.items()
            if key in info.load.gauges
        ]

    meter.create_observable_gauge(
        "antiphon.tier.resident", callbacks=[of("resident")], description="1 while an expert that shares memory can answer at once."
    )
    meter.create_observable_gauge(
        "antiphon.tier.load_expected", callbacks=[of("load_s")], unit="s", description="Until it could answer; 0 when it can."
    )
    meter.create_observable_counter("antiphon.tier.loads", callbacks=[of("num_loads")], description="Times it was loaded.")
    meter.create_observable_gauge(
        "antiphon.tier.load_time", callbacks=[stages], unit="s", description="Stages of its last load: evict, read, convert, ready."
    )
