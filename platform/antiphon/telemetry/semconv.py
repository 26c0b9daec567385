"""Names of spans, attributes and metrics: the GenAI semantic conventions, and our own where those have none (values).

Source of the ``gen_ai.*`` and ``error.*`` names and of the bucket boundaries: OpenTelemetry's GenAI semantic
conventions (status: development), https://github.com/open-telemetry/semantic-conventions-genai, under docs/gen-ai.
Names under ``antiphon.*`` are ours. Must not know: when any of them is recorded.
"""

from __future__ import annotations

from typing import Final

# Attributes of the request.
OPERATION_NAME: Final = "gen_ai.operation.name"
PROVIDER_NAME: Final = "gen_ai.provider.name"
REQUEST_MODEL: Final = "gen_ai.request.model"
REQUEST_MAX_TOKENS: Final = "gen_ai.request.max_tokens"
REQUEST_TEMPERATURE: Final = "gen_ai.request.temperature"
REQUEST_TOP_P: Final = "gen_ai.request.top_p"
REQUEST_TOP_K: Final = "gen_ai.request.top_k"
REQUEST_SEED: Final = "gen_ai.request.seed"
REQUEST_STREAM: Final = "gen_ai.request.stream"
REQUEST_CHOICE_COUNT: Final = "gen_ai.request.choice.count"  # OpenAI's n
REQUEST_FREQUENCY_PENALTY: Final = "gen_ai.request.frequency_penalty"
REQUEST_PRESENCE_PENALTY: Final = "gen_ai.request.presence_penalty"

# Attributes of the answer.
INPUT_MESSAGES: Final = "gen_ai.input.messages"  # content: only where CONTENT_VARIABLE asks for it
OUTPUT_MESSAGES: Final = "gen_ai.output.messages"
CONTENT_VARIABLE: Final = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"
RESPONSE_ID: Final = "gen_ai.response.id"
RESPONSE_MODEL: Final = "gen_ai.response.model"
RESPONSE_FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
RESPONSE_TIME_TO_FIRST_CHUNK: Final = "gen_ai.response.time_to_first_chunk"  # s
USAGE_INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
USAGE_OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
USAGE_CACHE_READ_INPUT_TOKENS: Final = "gen_ai.usage.cache_read.input_tokens"
TOKEN_TYPE: Final = "gen_ai.token.type"  # noqa: S105 - an attribute's name
ERROR_TYPE: Final = "error.type"

# Values.
OPERATION_CHAT: Final = "chat"
OPERATION_TEXT_COMPLETION: Final = "text_completion"
PROVIDER_ANTIPHON: Final = "antiphon"
TOKEN_TYPE_INPUT: Final = "input"  # noqa: S105
TOKEN_TYPE_OUTPUT: Final = "output"  # noqa: S105

# Metrics of a model server, with the boundaries the conventions ask for.
METRIC_REQUEST_DURATION: Final = "gen_ai.server.request.duration"  # s
METRIC_TIME_TO_FIRST_TOKEN: Final = "gen_ai.server.time_to_first_token"  # noqa: S105
METRIC_TIME_PER_OUTPUT_TOKEN: Final = "gen_ai.server.time_per_output_token"  # noqa: S105
METRIC_TOKEN_USAGE: Final = "gen_ai.client.token.usage"  # noqa: S105

BUCKETS_REQUEST_DURATION_S: Final = (
    0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92,
)  # fmt: skip
BUCKETS_TIME_TO_FIRST_TOKEN_S: Final = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
)  # fmt: skip
BUCKETS_TIME_PER_OUTPUT_TOKEN_S: Final = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
)  # fmt: skip
BUCKETS_TOKENS: Final = (
    1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304, 16777216, 67108864,
)  # fmt: skip

# Ours: who did the work, and the spans of a request's stages.
REQUEST_ID: Final = "antiphon.request.id"
WORKER: Final = "antiphon.worker"
ROLE: Final = "antiphon.role"
POOL: Final = "antiphon.pool"
TOPOLOGY: Final = "antiphon.topology"
NUM_CACHED_TOKENS: Final = "antiphon.num_cached_tokens"
NUM_REMOTE_TOKENS: Final = "antiphon.num_remote_tokens"
NUM_PREEMPTIONS: Final = "antiphon.num_preemptions"
SPAN_QUEUE: Final = "queue"
SPAN_PREFILL: Final = "prefill"
SPAN_KV_TRANSFER: Final = "kv_transfer"
SPAN_DECODE: Final = "decode"
