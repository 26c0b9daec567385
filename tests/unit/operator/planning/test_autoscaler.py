"""What size a pool wants."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from antiphon.core.document.policies import SloSpec
from antiphon.core.document.pools import PoolSpec
from antiphon_operator.planning.autoscaler import Metrics, PoolMemory, PoolView, wish

SLO = SloSpec(ttft_ms=500.0, tpot_ms=50.0)


def pool(role: str = "decode", **scaling: Any) -> PoolSpec:
    return PoolSpec.model_validate(
        {"name": "p", "role": role, "replicas": 2, "scaling": {"mode": "SLO", "minReplicas": 1, "maxReplicas": 8, **scaling}}
    )


def measured(at_s: float = 100.0, **values: float) -> PoolView:
    return PoolView(ready=4, metrics=Metrics(measured_at_s=at_s, **values))


NOW = PoolMemory(accepted=4)


def test_a_static_pool_has_the_size_of_its_document() -> None:
    static = PoolSpec(name="p", role="decode", replicas=3)
    assert wish(static, SLO, PoolView(asked=9), NOW, 100.0).replicas == 3


def test_an_external_pool_follows_its_scale_within_bounds() -> None:
    external = pool(mode="External")
    assert wish(external, SLO, PoolView(asked=6), NOW, 100.0).replicas == 6
    assert wish(external, SLO, PoolView(asked=60), NOW, 100.0).replicas == 8


@pytest.mark.parametrize(
    ("role", "values", "expected"),
    [
        ("decode", {"tpot_p95_ms": 100.0}, 8),
        ("decode", {"tpot_p95_ms": 62.0}, 5),
        ("decode", {"tpot_p95_ms": 52.0}, 4),
        ("decode", {"ttft_p95_ms": 5000.0}, 4),
        ("prefill", {"ttft_p95_ms": 750.0}, 6),
        ("monolith", {"ttft_p95_ms": 750.0, "tpot_p95_ms": 60.0}, 6),
        ("ffn", {"tpot_p95_ms": 75.0}, 6),
    ],
)
def test_an_slo_pool_grows_with_the_worst_of_its_measures(role: str, values: dict[str, float], expected: int) -> None:
    assert wish(pool(role), SLO, measured(**values), NOW, 100.0).replicas == expected


def test_queues_and_kv_usage_count_too() -> None:
    busy = pool(targetQueuePerWorker=10, targetKvUsage=0.8)
    assert wish(busy, SLO, measured(num_waiting=60.0), NOW, 100.0).replicas == 6
    assert wish(busy, SLO, measured(kv_usage=1.0), NOW, 100.0).replicas == 5


def test_stale_metrics_hold_the_size() -> None:
    held = wish(pool(), SLO, measured(at_s=10.0, tpot_p95_ms=5.0), NOW, 100.0)
    assert (held.replicas, held.stale) == (4, True)
    assert wish(pool(), SLO, PoolView(), NOW, 100.0).stale


def test_less_is_followed_only_after_the_window() -> None:
    low = measured(tpot_p95_ms=25.0)
    first = wish(pool(), SLO, low, NOW, 100.0)
    assert (first.replicas, first.memory.low_since_s) == (4, 100.0)
    later = replace(low, metrics=Metrics(measured_at_s=399.0, tpot_p95_ms=25.0))
    assert wish(pool(), SLO, later, first.memory, 399.0).replicas == 4
    last = replace(low, metrics=Metrics(measured_at_s=400.0, tpot_p95_ms=25.0))
    assert wish(pool(), SLO, last, first.memory, 400.0).replicas == 2


def test_a_peak_within_the_window_starts_it_anew() -> None:
    low = wish(pool(), SLO, measured(tpot_p95_ms=25.0), NOW, 100.0)
    assert wish(pool(), SLO, measured(at_s=200.0, tpot_p95_ms=50.0), low.memory, 200.0).memory.low_since_s is None


def test_pods_without_room_lower_the_target_after_the_deadline_and_it_is_tried_again() -> None:
    external = pool(mode="External", pendingDeadlineS=60)
    waiting = PoolView(asked=8, ready=3, pending=5)
    memory = replace(NOW, accepted=8)
    first = wish(external, SLO, waiting, memory, 100.0)
    assert (first.replicas, first.capped) == (8, False)
    capped = wish(external, SLO, waiting, first.memory, 160.0)
    assert (capped.replicas, capped.capped) == (3, True)
    calm = replace(waiting, pending=0)
    assert wish(external, SLO, calm, capped.memory, 200.0).replicas == 3
    again = wish(external, SLO, calm, replace(capped.memory, accepted=3), 220.0)
    assert again.replicas == 8


ASLEEP = pool(minReplicas=0, targetQueuePerWorker=10, scaleDownWindowS=300)


def test_a_pool_that_may_sleep_goes_to_sleep_when_nothing_was_asked_for_a_window() -> None:
    idle = measured(num_busy=0.0, num_waiting=0.0)
    first = wish(ASLEEP, SLO, idle, NOW, 100.0)
    assert (first.desired, first.replicas) == (0, 4)
    later = replace(idle, metrics=Metrics(measured_at_s=400.0, num_busy=0.0))
    assert wish(ASLEEP, SLO, later, first.memory, 400.0).replicas == 0


def test_a_stream_keeps_a_pool_awake_though_nothing_waits() -> None:
    streaming = measured(num_busy=1.0, num_waiting=0.0)
    assert wish(ASLEEP, SLO, streaming, replace(NOW, low_since_s=-1000.0), 100.0).replicas == 1


@pytest.mark.parametrize("role", ["monolith", "attention", "ffn", "prefill"])
def test_a_held_request_wakes_every_pool_at_once(role: str) -> None:
    asleep = PoolView(metrics=Metrics(measured_at_s=100.0, num_busy=1.0))
    sleeper = pool(role, minReplicas=0, targetQueuePerWorker=10)
    assert wish(sleeper, SloSpec(), asleep, PoolMemory(accepted=0), 100.0).replicas == 1


def test_a_pool_with_a_floor_never_sleeps() -> None:
    assert wish(pool(), SLO, measured(num_busy=0.0, tpot_p95_ms=0.1), replace(NOW, low_since_s=-1000.0), 100.0).replicas == 1
