"""Stages of a step in /metrics: what workers last reported, observed when somebody scrapes (request speed).

Two kinds: gauges of the worker's last window, for people; and sums since start, for queries that take windows of their own, e.g.
``rate(antiphon_stage_seconds_total{stage="ffn"}[1m]) / rate(antiphon_stage_exchanges_total[1m])``. A worker that has no such stage
shows none. Must not know: exporters, how figures come about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from antiphon.core.worker_info import WorkerInfo
from antiphon.telemetry import CallbackOptions, Meter, Observation

_GAUGES = {
    "t_attention_s": ("antiphon.stage.attention_time", "s", "Attention side's work for one layer and ubatch."),
    "t_ffn_s": ("antiphon.stage.ffn_time", "s", "FFN's work for one layer: of a ubatch (attention side), of a batch (FFN side)."),
    "t_transfer_s": ("antiphon.stage.transfer_time", "s", "One way between attention and FFN, at most."),
    "t_queue_s": ("antiphon.stage.queue_time", "s", "From the arrival of rows to the start of their batch."),
    "bubble_share": ("antiphon.stage.bubble_share", "", "Share of the time in which the worker waits for its peers."),
    "head_share": ("antiphon.stage.head_share", "", "Share of the step in the LM head."),
    "sample_share": ("antiphon.stage.sample_share", "", "Share of the step in the sampler."),
    "schedule_share": ("antiphon.stage.schedule_share", "", "Scheduling and hand-over, as a share of the step."),
    "rows_per_batch": ("antiphon.stage.rows_per_ffn_batch", "{row}", "Rows that an FFN worker computes together."),
    "ffn_hidden": ("antiphon.stage.ffn_hidden", "", "1 when the FFN takes no longer than the attention side."),
}
_SUMS = {
    "sum_step_s": "step",
    "sum_attention_s": "attention",
    "sum_send_s": "send",
    "sum_blocked_s": "blocked",
    "sum_round_trip_s": "round_trip",
    "sum_ffn_compute_s": "ffn",
    "sum_ffn_wait_s": "ffn_queue",
    "sum_head_s": "head",
    "sum_sample_s": "sample",
    "sum_compute_s": "compute",
    "sum_wait_s": "queue",
    "sum_busy_s": "busy",
}
_COUNTS = {
    "num_exchanges": ("antiphon.stage.exchanges", "Exchanges: a layer and ubatch each."),
    "num_resent": ("antiphon.stage.resent", "Exchanges whose rows were sent again after a peer was lost."),
}

Attributes = Callable[[WorkerInfo], Mapping[str, str]]
_Observer = Callable[[CallbackOptions], Iterable[Observation]]


def observe_stages(meter: Meter, workers: Callable[[], Sequence[WorkerInfo]], attributes: Attributes) -> None:
    """Make the instruments.

    Args:
        meter: makes them.
        workers: the latest records' workers, read at each scrape.
        attributes: a worker's labels.
    """

    def of(key: str) -> _Observer:
        def observe(_options: CallbackOptions) -> Iterable[Observation]:
            return [Observation(info.load.gauges[key], attributes(info)) for info in workers() if key in info.load.gauges]

        return observe

    def sums(_options: CallbackOptions) -> Iterable[Observation]:
        return [
            Observation(info.load.gauges[key], {**attributes(info), "stage": stage})
            for info in workers()
            for key, stage in _SUMS.items()
            if key in info.load.gauges
        ]

    for key, (name, unit, description) in _GAUGES.items():
        meter.create_observable_gauge(name, callbacks=[of(key)], unit=unit, description=description)
    for key, (name, description) in _COUNTS.items():
        meter.create_observable_counter(name, callbacks=[of(key)], description=description)
    meter.create_observable_counter(
        "antiphon.stage.seconds", callbacks=[sums], description="Seconds spent in each stage of steps since the worker's start."
    )
