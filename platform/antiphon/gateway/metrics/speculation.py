"""Speculation in /metrics: drafts verified and taken, by drafter (request speed).

Observed from the latest records when somebody scrapes; a worker that does not speculate shows none. Accepted per step is the
quotient of two counters' rates: taken over verifications. Must not know: exporters, who drafts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from antiphon.core.worker_info import WorkerInfo
from antiphon.telemetry import CallbackOptions, Meter, Observation

Attributes = Callable[[WorkerInfo], Mapping[str, str]]

_PREFIX = "speculation."  # of gauges: speculation.DRAFTER.FIGURE, as workers name them
_COUNTERS = {
    "verifications": ("antiphon.speculation.verifications", "Steps of requests that verified drafts."),
    "drafts": ("antiphon.speculation.drafts", "Drafts verified."),
    "taken": ("antiphon.speculation.taken", "Of them, drafts that were what the model drew."),
}


def observe_speculation(meter: Meter, workers: Callable[[], Sequence[WorkerInfo]], attributes: Attributes) -> None:
    """Make the instruments.

    Args:
        meter: makes them.
        workers: the latest records' workers, read at each scrape.
        attributes: the labels of a worker's figures.
    """
    for figure, (name, description) in _COUNTERS.items():

        def observe(_options: CallbackOptions, figure: str = figure) -> Iterable[Observation]:
            return [
                Observation(value, {**attributes(info), "drafter": parts[1]})
                for info in workers()
                for key, value in info.load.gauges.items()
                if key.startswith(_PREFIX) and len(parts := key.split(".")) == 3 and parts[2] == figure
            ]

        meter.create_observable_counter(name, callbacks=[observe], description=description)
