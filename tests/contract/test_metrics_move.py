"""Every metric that the product exports moves when what it tells of happens: a new one needs its line in a table here.

One table for what a gateway and the operator count themselves, one for what a gateway shows of workers' records; and those records
are filled by real engines that do what each figure counts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from antiphon.apps.process.engine_host import EngineHost
from antiphon.apps.process.roles.ffn import FFNRole
from antiphon.coe.routing.learning.online import Feedback, OnlineLearner
from antiphon.coe.serving.deciders import LocalRoutes
from antiphon.coe.serving.gateway import watch_learning
from antiphon.core.budget import TenantLimits, Use, Verdict
from antiphon.core.document.composition import LearningSpec
from antiphon.core.ids import Endpoint, Epoch, Role, WorkerId
from antiphon.core.worker_info import WorkerInfo, WorkerLoad
from antiphon.gateway.access.admission import Admission, RateLimited
from antiphon.gateway.experts import GatewayExperts
from antiphon.gateway.metrics.instruments import GatewayMetrics
from antiphon.telemetry import setup
from antiphon.telemetry.stages import StageWindow, ffn_figures
from antiphon.testing import FakeClock, LocalCluster, wiring, write_tiny_llama
from antiphon_operator.controller.observability import OperatorMetrics


class Exported:
    """Everything of a gateway with compositions that makes instruments, and the operator."""

    def __init__(self, telemetry: Any) -> None:
        self.telemetry = telemetry
        self.worker = WorkerInfo(
            worker_id=WorkerId("d/a/0"), deployment="d", pool="a", role=Role.FFN, model="m", revision="r", fingerprint="f",
            epoch=Epoch(1), endpoint=Endpoint(rpc="h:1", data=""), pid=1, host="h", ready=False, num_experts=4,
        )  # fmt: skip
        self.num_requests, self.num_held = 0, 0
        self.gateway = GatewayMetrics(
            telemetry, workers=lambda: [self.worker], num_requests=lambda: self.num_requests, held=lambda: {"m": self.num_held}
        )
        self.rows = {0: (1, 1)}
        self.experts = GatewayExperts(workers=lambda: [self.worker], keys=cast(Any, None), telemetry=telemetry)
        self.learner = OnlineLearner(LearningSpec(min_feedback=1, prior_feedback=0.0))
        routes = object.__new__(LocalRoutes)
        cast(Any, routes).router = SimpleNamespace(learner=self.learner)
        watch_learning(telemetry, cast(Any, {"c": SimpleNamespace(name="c", routes=routes)}))
        self.admission = Admission(cast(Any, self), lambda _tenant: TenantLimits(requests_per_min=1), telemetry)
        self.operator = OperatorMetrics()

    def load(self, **changed: Any) -> None:
        self.worker = replace(self.worker, load=replace(self.worker.load, **changed))

    def gauge(self, name: str, value: float = 1.0) -> None:
        self.load(gauges={**self.worker.load.gauges, name: value})

    def count_rows(self, rows: tuple[int, ...]) -> None:
        async def told(_info: WorkerInfo) -> Any:
            return SimpleNamespace(info=self.worker, load=SimpleNamespace(rows={0: rows}))

        cast(Any, self.experts)._ask = told
        asyncio.run(self.experts.refresh())

    def learn(self, *scores: float) -> None:
        for score in scores:
            self.learner.learn(Feedback(category="sums", expert="small", expected=0.5, score=score))

    async def take_budget(self, _wish: object) -> Verdict:
        return Verdict(exceeded="requests", retry_after_s=1.0)

    def refuse(self) -> None:
        with pytest.raises(RateLimited):
            asyncio.run(self.admission.enter("t", 5, None))

    def samples(self) -> dict[str, dict[str, float]]:
        """Sample values by family."""
        text = self.telemetry.prometheus_text().decode() + generate_latest(self.operator.registry).decode()
        return {
            family.name: {f"{s.name}{sorted(s.labels.items())}": s.value for s in family.samples if not s.name.endswith("_created")}
            for family in text_string_to_metric_families(text)
        }


Move = Callable[[Exported], object]
_USE = Use(tenant="t", model="m", num_requests=1, num_prompt_tokens=2, num_cached_tokens=1, num_output_tokens=3)


def field(name: str) -> Move:
    return lambda told: told.load(**{name: getattr(told.worker.load, name) + 1})


def gauge(name: str) -> Move:
    return lambda told: told.gauge(name)


COUNTED: Mapping[str, Move] = {
    "gen_ai_server_time_to_first_token_seconds": lambda told: told.gateway.first_token("m", 0.1),
    "gen_ai_server_time_per_output_token_seconds": lambda told: told.gateway.tokens("m", 2, 0.1),
    "gen_ai_server_request_duration_seconds": lambda told: told.gateway.request_finished("m", 1.0, 3, 1),
    "antiphon_request_queue_time_seconds": lambda told: told.gateway.choice_finished("m", "stop", 0.1),
    "antiphon_prompt_tokens": lambda told: told.gateway.request_finished("m", 1.0, 3, 1),
    "antiphon_cached_tokens": lambda told: told.gateway.request_finished("m", 1.0, 3, 1),
    "antiphon_generation_tokens": lambda told: told.gateway.generated("m", 2),
    "antiphon_requests_finished": lambda told: told.gateway.choice_finished("m", "stop", None),
    "antiphon_requests_failed": lambda told: told.gateway.request_failed("m", "overloaded"),
    "antiphon_requests_resumed": lambda told: told.gateway.resumed("m"),
    "antiphon_gateway_requests": lambda told: setattr(told, "num_requests", 1),
    "antiphon_requests_held": lambda told: setattr(told, "num_held", 1),
    "antiphon_tenant_tokens": lambda told: told.admission.count(_USE),
    "antiphon_tenant_refused": lambda told: told.refuse(),
    "antiphon_expert_rows": lambda told: told.count_rows((5, 1)),
    "antiphon_expert_imbalance": lambda told: told.count_rows((7, 1)),
    "antiphon_coe_feedback": lambda told: told.learn(1.0),
    "antiphon_coe_shift": lambda told: told.learn(0.0, 0.0),
    "antiphon_coe_drift": lambda told: told.learn(1.0, 1.0, 1.0),
    "antiphon_coe_drift_alarms": lambda told: told.learn(*[1.0] * 200, *[0.0] * 400),
    "antiphon_operator_reconciles": lambda told: told.operator.passes.labels(kind="k", result="ok").inc(),
    "antiphon_operator_reconcile_seconds": lambda told: told.operator.seconds.labels(kind="k").observe(0.1),
    "antiphon_operator_queued_keys": lambda told: told.operator.queued.set(1),
    "antiphon_operator_startup_seconds": lambda told: told.operator.stage("scheduled", 5.0),
    "antiphon_operator_leader": lambda told: told.operator.leading.set(1),
}
OF_WORKERS: Mapping[str, Move] = {
    "antiphon_worker_ready": lambda told: setattr(told, "worker", replace(told.worker, ready=True)),
    "antiphon_worker_requests_waiting": field("num_waiting"),
    "antiphon_worker_requests_running": field("num_running"),
    "antiphon_worker_kv_usage": lambda told: told.load(num_total_blocks=4, num_free_blocks=1),
    "antiphon_worker_peers": field("num_peers"),
    "antiphon_worker_resident_weight_bytes": field("resident_weight_bytes"),
    "antiphon_worker_resident_memory_bytes": field("resident_memory_bytes"),
    "antiphon_worker_expert_placement": field("placement"),
    "antiphon_worker_experts_skipped_share": lambda told: told.load(num_expert_choices=4, num_experts_skipped=1),
    "antiphon_worker_steps": field("num_steps"),
    "antiphon_worker_prompt_tokens": field("num_prompt_tokens"),
    "antiphon_worker_generation_tokens": field("num_generation_tokens"),
    "antiphon_worker_preemptions": field("num_preemptions"),
    "antiphon_worker_prefix_queries": field("num_prefix_query_tokens"),
    "antiphon_worker_prefix_hits": field("num_prefix_hit_tokens"),
    "antiphon_worker_ffn_rows": field("num_ffn_rows"),
    "antiphon_worker_ffn_batches": field("num_ffn_batches"),
    "antiphon_worker_expert_choices": field("num_expert_choices"),
    "antiphon_worker_experts_skipped": field("num_experts_skipped"),
    "antiphon_worker_kv_transfers": field("num_kv_transfers"),
    "antiphon_worker_kv_failures": field("num_kv_failures"),
    "antiphon_stage_attention_time_seconds": gauge("t_attention_s"),
    "antiphon_stage_ffn_time_seconds": gauge("t_ffn_s"),
    "antiphon_stage_transfer_time_seconds": gauge("t_transfer_s"),
    "antiphon_stage_queue_time_seconds": gauge("t_queue_s"),
    "antiphon_stage_bubble_share": gauge("bubble_share"),
    "antiphon_stage_head_share": gauge("head_share"),
    "antiphon_stage_sample_share": gauge("sample_share"),
    "antiphon_stage_schedule_share": gauge("schedule_share"),
    "antiphon_stage_rows_per_ffn_batch": gauge("rows_per_batch"),
    "antiphon_stage_ffn_hidden": gauge("ffn_hidden"),
    "antiphon_stage_exchanges": gauge("num_exchanges"),
    "antiphon_stage_resent": gauge("num_resent"),
    "antiphon_stage_seconds": gauge("sum_step_s"),
    "antiphon_tier_resident": gauge("resident"),
    "antiphon_tier_load_expected_seconds": gauge("load_s"),
    "antiphon_tier_loads": gauge("num_loads"),
    "antiphon_tier_load_time_seconds": gauge("load_read_s"),
    "antiphon_speculation_verifications": gauge("speculation.ngram.verifications"),
    "antiphon_speculation_drafts": gauge("speculation.ngram.drafts"),
    "antiphon_speculation_taken": gauge("speculation.ngram.taken"),
}
MOVES = {**COUNTED, **OF_WORKERS}
_OF_LIBRARIES = ("target_info", "process_", "vllm:")  # the last have a test of their own


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[Exported]:
    monkeypatch.delenv("OTEL_SDK_DISABLED", raising=False)
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    with setup("test") as telemetry:
        yield Exported(telemetry)


def test_each_metric_has_its_line_and_moves_by_it(told: Exported) -> None:
    still = []
    for name, move in MOVES.items():
        before = told.samples().get(name, {})
        move(told)
        if told.samples().get(name, {}) == before:
            still.append(name)
    assert still == []
    exported = {name for name in told.samples() if not name.startswith(_OF_LIBRARIES) and not name.endswith("_created")}
    assert exported == MOVES.keys()


def test_every_name_of_vllms_moves_with_ours(told: Exported) -> None:
    before = told.samples()
    for move in MOVES.values():
        move(told)
    after = told.samples()
    assert [name for name in after if name.startswith("vllm:") and after[name] == before.get(name)] == []
    assert sum(name.startswith("vllm:") for name in after) == 15


# ---- and workers really fill their records --------------------------------------------------------------------------------------

# Those that hosts of processes add, and those that need a lost peer: tests/unit/worker and tests/e2e make them move.
_ELSEWHERE = {"resident_memory_bytes", "placement", "num_expert_choices", "num_experts_skipped", "num_kv_failures", "gauges"}
_OF_ENGINES = {
    "num_waiting", "num_running", "num_free_blocks", "num_total_blocks", "num_cached_blocks", "num_steps", "num_prompt_tokens",
    "num_generation_tokens", "num_preemptions", "num_prefix_hit_tokens", "num_prefix_query_tokens", "num_peers", "num_kv_transfers",
    "resident_weight_bytes",
}  # fmt: skip
_OF_FFN = {"num_peers", "num_ffn_rows", "num_ffn_batches", "resident_weight_bytes"}


def test_engines_fill_every_figure_of_their_records(tmp_path: Path) -> None:
    assert {one.name for one in fields(WorkerLoad)} == _ELSEWHERE | _OF_ENGINES | _OF_FFN
    checkpoint = write_tiny_llama(tmp_path)
    spec = wiring(checkpoint, "pd-afd", cache={"numBlocks": 12, "blockSizeTokens": 16}, scheduler={"remotePrefillMinTokens": 16})
    most: dict[str, dict[str, float]] = {"attention": {}, "prefill": {}, "ffn": {}}
    with LocalCluster(spec, checkpoint, FakeClock()) as cluster:
        hosts = {
            "attention": EngineHost(cluster.generating[0], cast(Any, None), "attention"),
            "prefill": EngineHost(cluster.prefilling[0], cast(Any, None), "prefill"),
        }
        ffn = object.__new__(FFNRole)
        ffn._worker, ffn._started_s, ffn._window = cluster.ffns[0], 0.0, StageWindow(ffn_figures)

        def look() -> None:
            for role, load in (*[(name, host.load()) for name, host in hosts.items()], ("ffn", ffn.load())):
                for one in fields(WorkerLoad):
                    if one.name != "gauges":
                        most[role][one.name] = max(most[role].get(one.name, 0), getattr(load, one.name))

        prompt = [number % 200 for number in range(48)]
        cluster.generate(prompt, prefill=0, max_tokens=2)
        for index in range(4):  # more than the blocks hold: some wait, and some are preempted
            cluster.submit([*prompt, index], max_tokens=40)
        look()
        while cluster.step():
            look()
    assert {name for name in _OF_ENGINES if not most["attention"][name]} == set()
    assert {name for name in _OF_FFN if not most["ffn"][name]} == set()
    of_prefill = {"num_prompt_tokens", "num_steps", "num_kv_transfers", "num_prefix_query_tokens", "num_total_blocks", "num_peers"}
    assert {name for name in of_prefill if not most["prefill"][name]} == set()
