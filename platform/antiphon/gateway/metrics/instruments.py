"""The gateway's instruments, and vLLM's names for them (request speed).

What a request did is recorded when it happens; what workers report is observed from the latest records when somebody scrapes.
Must not know: exporters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from antiphon.core.worker_info import WorkerInfo
from antiphon.gateway.metrics.speculation import observe_speculation
from antiphon.gateway.metrics.stages import observe_stages
from antiphon.gateway.metrics.tiers import observe_tiers
from antiphon.telemetry import CallbackOptions, Meter, Observation, Telemetry, semconv

_Read = Callable[[WorkerInfo], float]

# Labels as Prometheus shows them, ours → vLLM's.
_MODEL_LABEL = {"gen_ai_request_model": "model_name"}
_QUEUE_BUCKETS_S = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class GatewayMetrics:
    """Instruments of one gateway process. Any thread may record.

    Args:
        telemetry: makes the instruments.
        workers: the latest records' workers, read at each scrape.
        num_requests: this gateway's requests, read at each scrape.
        held: requests that wait for a pool to wake, by model, read at each scrape.
    """

    def __init__(
        self,
        telemetry: Telemetry,
        *,
        workers: Callable[[], Sequence[WorkerInfo]],
        num_requests: Callable[[], int],
        held: Callable[[], Mapping[str, int]],
    ) -> None:
        meter = telemetry.meter(__name__)
        self._workers = workers
        self._first_token = meter.create_histogram(
            semconv.METRIC_TIME_TO_FIRST_TOKEN,
            unit="s",
            description="Seconds from a request's arrival to its first token.",
            explicit_bucket_boundaries_advisory=semconv.BUCKETS_TIME_TO_FIRST_TOKEN_S,
        )
        self._inter_token = meter.create_histogram(
            semconv.METRIC_TIME_PER_OUTPUT_TOKEN,
            unit="s",
            description="Seconds between a choice's tokens after the first.",
            explicit_bucket_boundaries_advisory=semconv.BUCKETS_TIME_PER_OUTPUT_TOKEN_S,
        )
        self._duration = meter.create_histogram(
            semconv.METRIC_REQUEST_DURATION,
            unit="s",
            description="Seconds from a request's arrival to its end.",
            explicit_bucket_boundaries_advisory=semconv.BUCKETS_REQUEST_DURATION_S,
        )
        self._queue = meter.create_histogram(
            "antiphon.request.queue_time",
            unit="s",
            description="Seconds a choice waited in its engine's queue.",
            explicit_bucket_boundaries_advisory=_QUEUE_BUCKETS_S,
        )
        self._prompt_tokens = meter.create_counter("antiphon.prompt_tokens", description="Prompt tokens of requests.")
        self._generated: Counter[str] = Counter()  # by model; observed when somebody scrapes, since it grows with every token
        meter.create_observable_counter(
            "antiphon.generation_tokens",
            callbacks=[
                lambda _options: [Observation(n, {semconv.REQUEST_MODEL: each}) for each, n in tuple(self._generated.items())]
            ],
            description="Tokens generated.",
        )
        self._cached_tokens = meter.create_counter("antiphon.cached_tokens", description="Prompt tokens found in a prefix cache.")
        self._finished = meter.create_counter("antiphon.requests.finished", description="Choices by finish reason.")
        self._failed = meter.create_counter("antiphon.requests.failed", description="Requests by error code.")
        self._resumed = meter.create_counter(
            "antiphon.requests.resumed", description="Times a request went on elsewhere after its worker was lost."
        )
        meter.create_observable_gauge(
            "antiphon.gateway.requests",
            callbacks=[lambda _options: [Observation(num_requests())]],
            description="Requests this gateway is answering.",
        )
        meter.create_observable_gauge(
            "antiphon.requests.held",
            callbacks=[lambda _options: [Observation(n, {semconv.REQUEST_MODEL: model}) for model, n in held().items()]],
            description="Requests that wait for a sleeping pool's first worker.",
        )
        self._observe_workers(meter)
        observe_stages(meter, workers, _attributes)
        observe_tiers(meter, workers, _attributes)
        observe_speculation(meter, workers, _attributes)
        _add_aliases(telemetry)

    def first_token(self, model: str, seconds: float) -> None:
        """A request's first token came."""
        self._first_token.record(seconds, {semconv.REQUEST_MODEL: model})

    def tokens(self, model: str, num_tokens: int, seconds: float) -> None:
        """Further tokens of a choice came, ``seconds`` after the ones before."""
        for _ in range(num_tokens):
            self._inter_token.record(seconds / num_tokens, {semconv.REQUEST_MODEL: model})

    def generated(self, model: str, num_tokens: int) -> None:
        """Tokens came. On the event loop."""
        self._generated[model] += num_tokens

    def choice_finished(self, model: str, reason: str, queue_s: float | None) -> None:
        """A choice ended: stop, length, abort or error."""
        self._finished.add(1, {semconv.REQUEST_MODEL: model, "finished_reason": reason})
        if queue_s is not None:
            self._queue.record(queue_s, {semconv.REQUEST_MODEL: model})

    def request_finished(self, model: str, seconds: float, num_prompt_tokens: int, num_cached_tokens: int) -> None:
        """All choices of a request are there."""
        attributes = {semconv.REQUEST_MODEL: model}
        self._duration.record(seconds, attributes)
        self._prompt_tokens.add(num_prompt_tokens, attributes)
        self._cached_tokens.add(num_cached_tokens, attributes)

    def request_failed(self, model: str, code: str) -> None:
        """A request ended with an error, or its client left (code cancelled)."""
        self._failed.add(1, {semconv.REQUEST_MODEL: model, semconv.ERROR_TYPE: code})

    def resumed(self, model: str) -> None:
        """A request goes on elsewhere."""
        self._resumed.add(1, {semconv.REQUEST_MODEL: model})

    def _observe_workers(self, meter: Meter) -> None:
        for name, (description, read) in _WORKER_GAUGES.items():
            meter.create_observable_gauge(name, callbacks=[self._observer(read)], description=description)
        for name, (description, read) in _WORKER_COUNTERS.items():
            meter.create_observable_counter(name, callbacks=[self._observer(read)], description=description)

    def _observer(self, read: _Read) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def observe(_options: CallbackOptions) -> Iterable[Observation]:
            return [Observation(read(info), _attributes(info)) for info in self._workers()]

        return observe


def kv_usage(info: WorkerInfo) -> float:
    """Used share of a worker's KV blocks, 0 to 1; 0 where there are none."""
    load = info.load
    return 0.0 if load.num_total_blocks == 0 else 1.0 - min(load.num_free_blocks, load.num_total_blocks) / load.num_total_blocks


def _attributes(info: WorkerInfo) -> dict[str, str]:
    return {
        semconv.REQUEST_MODEL: info.model,
        semconv.WORKER: info.worker_id,
        semconv.POOL: info.pool,
        semconv.ROLE: info.role.value,
        "antiphon.deployment": info.deployment,
    }


_WORKER_GAUGES: dict[str, tuple[str, _Read]] = {
    "antiphon.worker.ready": ("1 while the worker is ready.", lambda info: float(info.ready)),
    "antiphon.worker.requests.waiting": ("Requests in the worker's queue.", lambda info: info.load.num_waiting),
    "antiphon.worker.requests.running": ("Requests in the worker's batch.", lambda info: info.load.num_running),
    "antiphon.worker.kv_usage": ("Used share of the worker's KV blocks.", kv_usage),
    "antiphon.worker.peers": ("Open links of the worker.", lambda info: info.load.num_peers),
    "antiphon.worker.resident_weight_bytes": ("Weights the worker holds.", lambda info: info.load.resident_weight_bytes),
    "antiphon.worker.resident_memory_bytes": ("Memory of the worker's process.", lambda info: info.load.resident_memory_bytes),
    "antiphon.worker.expert_placement": ("Number of the expert placement in use.", lambda info: info.load.placement),
    "antiphon.worker.experts_skipped_share": (
        "Share of the experts that rows chose which was skipped, since start.",
        lambda info: info.load.num_experts_skipped / max(1, info.load.num_expert_choices),
    ),
}
_WORKER_COUNTERS: dict[str, tuple[str, _Read]] = {
    "antiphon.worker.steps": ("Engine steps.", lambda info: info.load.num_steps),
    "antiphon.worker.prompt_tokens": ("Prompt tokens computed or loaded.", lambda info: info.load.num_prompt_tokens),
    "antiphon.worker.generation_tokens": ("Tokens sampled.", lambda info: info.load.num_generation_tokens),
    "antiphon.worker.preemptions": ("Preemptions.", lambda info: info.load.num_preemptions),
    "antiphon.worker.prefix_queries": (
        "Prompt tokens looked up in a cache.",
        lambda info: info.load.num_prefix_query_tokens,
    ),
    "antiphon.worker.prefix_hits": ("Prompt tokens found in a cache.", lambda info: info.load.num_prefix_hit_tokens),
    "antiphon.worker.ffn_rows": ("Rows an FFN worker computed.", lambda info: info.load.num_ffn_rows),
    "antiphon.worker.ffn_batches": ("Batches an FFN worker computed.", lambda info: info.load.num_ffn_batches),
    "antiphon.worker.expert_choices": (
        "Experts that rows chose, while skipping is on.",
        lambda info: info.load.num_expert_choices,
    ),
    "antiphon.worker.experts_skipped": ("Of them, not computed.", lambda info: info.load.num_experts_skipped),
    "antiphon.worker.kv_transfers": ("KV hand-offs.", lambda info: info.load.num_kv_transfers),
    "antiphon.worker.kv_failures": ("KV hand-offs that failed.", lambda info: info.load.num_kv_failures),
}

_VLLM_NAMES = {
    semconv.METRIC_TIME_TO_FIRST_TOKEN: ("vllm:time_to_first_token_seconds",),
    semconv.METRIC_TIME_PER_OUTPUT_TOKEN: ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds"),
    semconv.METRIC_REQUEST_DURATION: ("vllm:e2e_request_latency_seconds",),
    "antiphon.request.queue_time": ("vllm:request_queue_time_seconds",),
    "antiphon.prompt_tokens": ("vllm:prompt_tokens_total",),
    "antiphon.generation_tokens": ("vllm:generation_tokens_total",),
    "antiphon.requests.finished": ("vllm:request_success_total",),
    "antiphon.worker.requests.waiting": ("vllm:num_requests_waiting",),
    "antiphon.worker.requests.running": ("vllm:num_requests_running",),
    "antiphon.worker.kv_usage": ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
    "antiphon.worker.preemptions": ("vllm:num_preemptions_total",),
    "antiphon.worker.prefix_queries": ("vllm:prefix_cache_queries_total",),
    "antiphon.worker.prefix_hits": ("vllm:prefix_cache_hits_total",),
}


def _add_aliases(telemetry: Telemetry) -> None:
    for name, aliases in _VLLM_NAMES.items():
        for alias in aliases:
            telemetry.alias(name, alias, labels=_MODEL_LABEL)
