"""The Prometheus text, read back with Prometheus' own parser."""

from __future__ import annotations

import threading

import pytest
from prometheus_client.parser import text_string_to_metric_families

from antiphon import telemetry
from antiphon.core.errors import InvalidInput


@pytest.fixture
def meters(monkeypatch: pytest.MonkeyPatch) -> telemetry.Telemetry:
    for name in ("OTEL_SDK_DISABLED", "OTEL_METRICS_EXPORTER", "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_TRACES_EXPORTER"):
        monkeypatch.delenv(name, raising=False)
    return telemetry.setup("test")


def samples(of: telemetry.Telemetry) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(of.prometheus_text().decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_a_counter_is_rendered_with_its_labels(meters: telemetry.Telemetry) -> None:
    meters.meter(__name__).create_counter("antiphon.tokens.generation").add(3, {"model.name": "m"})
    assert samples(meters)["antiphon_tokens_generation_total", (("model_name", "m"),)] == 3


def test_an_alias_with_a_colon_shows_the_same_gauge(meters: telemetry.Telemetry) -> None:
    meters.alias("antiphon.requests.waiting", "vllm:num_requests_waiting")
    meters.meter(__name__).create_observable_gauge(
        "antiphon.requests.waiting", callbacks=[lambda options: [telemetry.Observation(4, {"model_name": "m"})]]
    )
    found = samples(meters)
    assert found["antiphon_requests_waiting", (("model_name", "m"),)] == 4
    assert found["vllm:num_requests_waiting", (("model_name", "m"),)] == 4


def test_an_alias_of_a_counter_keeps_total_once(meters: telemetry.Telemetry) -> None:
    meters.alias("antiphon.tokens.prompt", "vllm:prompt_tokens_total")
    meters.meter(__name__).create_counter("antiphon.tokens.prompt").add(5)
    assert samples(meters)["vllm:prompt_tokens_total", ()] == 5


def test_an_alias_of_a_histogram_shows_buckets_sum_and_count(meters: telemetry.Telemetry) -> None:
    meters.alias("gen_ai.server.time_to_first_token", "vllm:time_to_first_token_seconds")
    histogram = meters.meter(__name__).create_histogram(
        "gen_ai.server.time_to_first_token", unit="s", explicit_bucket_boundaries_advisory=[0.1, 1.0]
    )
    histogram.record(0.5)
    histogram.record(0.05)
    found = samples(meters)
    for name in ("gen_ai_server_time_to_first_token_seconds", "vllm:time_to_first_token_seconds"):
        assert found[f"{name}_bucket", (("le", "0.1"),)] == 1
        assert found[f"{name}_bucket", (("le", "+Inf"),)] == 2
        assert found[f"{name}_count", ()] == 2
        assert found[f"{name}_sum", ()] == pytest.approx(0.55)


def test_an_alias_may_rename_labels(meters: telemetry.Telemetry) -> None:
    meters.alias("n", "vllm:n", labels={"gen_ai_request_model": "model_name"})
    meters.meter(__name__).create_counter("n").add(1, {"gen_ai.request.model": "m"})
    assert samples(meters)["vllm:n_total", (("model_name", "m"),)] == 1


def test_adding_an_alias_twice_renders_it_once(meters: telemetry.Telemetry) -> None:
    meters.alias("n", "vllm:n")
    meters.alias("n", "vllm:n")
    meters.meter(__name__).create_up_down_counter("n").add(1)
    assert meters.prometheus_text().decode().count("# TYPE vllm:n gauge") == 1


def test_an_alias_that_prometheus_would_refuse_is_refused(meters: telemetry.Telemetry) -> None:
    with pytest.raises(InvalidInput, match="not a Prometheus name"):
        meters.alias("n", "vllm n")


def test_label_values_can_not_break_out_of_their_line(meters: telemetry.Telemetry) -> None:
    evil = 'x"} 1\nfake_metric 7'
    meters.meter(__name__).create_counter("n").add(1, {"model": evil})
    found = samples(meters)
    assert found["n_total", (("model", evil),)] == 1
    assert ("fake_metric", ()) not in found


def test_scrapes_at_the_same_time_each_see_every_sample_once(meters: telemetry.Telemetry) -> None:
    meters.meter(__name__).create_counter("n").add(1)
    texts: list[str] = []
    threads = [
        threading.Thread(target=lambda: texts.extend(meters.prometheus_text().decode() for _ in range(20))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 80
    assert {text.count("\nn_total 1.0") for text in texts} == {1}


def test_the_process_itself_is_measured(meters: telemetry.Telemetry) -> None:
    assert samples(meters)["process_resident_memory_bytes", ()] > 1e6
