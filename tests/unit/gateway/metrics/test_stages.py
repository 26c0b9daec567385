"""Stage figures that workers report stand in the scraped text, with the worker's labels."""

import re

import pytest

from antiphon.core.ids import Endpoint, Epoch, Role, WorkerId
from antiphon.core.worker_info import WorkerInfo, WorkerLoad
from antiphon.gateway.metrics.instruments import GatewayMetrics
from antiphon.telemetry import setup

ATTENTION = {
    "sum_step_s": 8.0, "sum_attention_s": 3.0, "sum_blocked_s": 1.0, "sum_ffn_compute_s": 4.0, "num_exchanges": 5000.0,
    "num_resent": 2.0, "t_attention_s": 6e-4, "t_ffn_s": 8e-4, "t_transfer_s": 2e-5, "bubble_share": 0.125, "ffn_hidden": 0.0,
}  # fmt: skip
FFN = {"sum_compute_s": 4.0, "sum_busy_s": 5.0, "t_ffn_s": 8e-4, "rows_per_batch": 31.5, "bubble_share": 0.25}


def info(role, gauges):
    return WorkerInfo(
        worker_id=WorkerId(f"d/{role.value}/0"), deployment="d", pool=role.value, role=role, model="m", revision="r",
        fingerprint="f", epoch=Epoch(1), endpoint=Endpoint(rpc="h:1", data=""), pid=1, host="h", load=WorkerLoad(gauges=gauges),
    )  # fmt: skip


@pytest.fixture
def scraped(monkeypatch):
    monkeypatch.delenv("OTEL_SDK_DISABLED", raising=False)
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    workers = [info(Role.ATTENTION, ATTENTION), info(Role.FFN, FFN), info(Role.PREFILL, {})]
    with setup("test") as telemetry:
        GatewayMetrics(telemetry, workers=lambda: workers, num_requests=lambda: 0, held=dict)
        yield telemetry.prometheus_text().decode()


def value(text, name, **labels):
    for line in text.splitlines():
        if re.match(rf"{name}\{{", line) and all(f'{key}="{label}"' in line for key, label in labels.items()):
            return float(line.rsplit(" ", 1)[1])
    return None


def test_both_sides_stages_are_gauges_of_their_last_window(scraped):
    assert value(scraped, "antiphon_stage_attention_time_seconds", antiphon_role="attention") == 6e-4
    assert value(scraped, "antiphon_stage_ffn_time_seconds", antiphon_role="attention") == 8e-4
    assert value(scraped, "antiphon_stage_ffn_time_seconds", antiphon_role="ffn") == 8e-4
    assert value(scraped, "antiphon_stage_transfer_time_seconds", antiphon_worker="d/attention/0") == 2e-5
    assert value(scraped, "antiphon_stage_bubble_share", antiphon_role="attention") == 0.125
    assert value(scraped, "antiphon_stage_bubble_share", antiphon_role="ffn") == 0.25
    assert value(scraped, "antiphon_stage_rows_per_ffn_batch", antiphon_role="ffn") == 31.5
    assert value(scraped, "antiphon_stage_ffn_hidden", antiphon_role="attention") == 0.0


def test_sums_since_start_are_counters_by_stage(scraped):
    assert value(scraped, "antiphon_stage_seconds_total", antiphon_role="attention", stage="ffn") == 4.0
    assert value(scraped, "antiphon_stage_seconds_total", antiphon_role="attention", stage="blocked") == 1.0
    assert value(scraped, "antiphon_stage_seconds_total", antiphon_role="ffn", stage="busy") == 5.0
    assert value(scraped, "antiphon_stage_exchanges_total", antiphon_role="attention") == 5000.0


def test_a_worker_shows_only_what_it_reports(scraped):
    assert value(scraped, "antiphon_stage_ffn_time_seconds", antiphon_role="prefill") is None
    assert value(scraped, "antiphon_stage_rows_per_ffn_batch", antiphon_role="attention") is None
