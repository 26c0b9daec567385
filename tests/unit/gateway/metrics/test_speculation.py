"""What workers verified and took of drafts stands in the scraped text, by drafter."""

import pytest

from antiphon.core.ids import Endpoint, Epoch, Role, WorkerId
from antiphon.core.worker_info import WorkerInfo, WorkerLoad
from antiphon.gateway.metrics.instruments import GatewayMetrics
from antiphon.telemetry import setup

GAUGES = {"speculation.ngram.verifications": 10.0, "speculation.ngram.drafts": 60.0, "speculation.ngram.taken": 42.0}


def info(number, gauges):
    return WorkerInfo(
        worker_id=WorkerId(f"d/m/{number}"), deployment="d", pool="m", role=Role.MONOLITH, model="m", revision="r",
        fingerprint="f", epoch=Epoch(1), endpoint=Endpoint(rpc="h:1", data=""), pid=1, host="h", load=WorkerLoad(gauges=gauges),
    )  # fmt: skip


def test_drafts_are_counters_by_drafter_of_workers_that_speculate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_SDK_DISABLED", raising=False)
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    with setup("test") as telemetry:
        GatewayMetrics(telemetry, workers=lambda: [info(0, GAUGES), info(1, {})], num_requests=lambda: 0, held=dict)
        text = telemetry.prometheus_text().decode()
    found = [line for line in text.splitlines() if line.startswith("antiphon_speculation_")]
    assert len(found) == 3
    assert all('drafter="ngram"' in line and 'antiphon_worker="d/m/0"' in line for line in found)
    values = {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in found}
    assert values["antiphon_speculation_taken_total"] / values["antiphon_speculation_verifications_total"] == 4.2
    assert values["antiphon_speculation_drafts_total"] == 60
