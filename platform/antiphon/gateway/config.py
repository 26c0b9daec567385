"""What a gateway is told at its start (values; control speed). Must not know: documents or environments it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from antiphon.core.document.coe.experts import ExternalEndpoint
from antiphon.core.document.composition import CompositionOfExperts
from antiphon.gateway.text.dialect import TextFormats
from antiphon.rpc.certificates import TlsFiles


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """Addresses, models and limits of one gateway process."""

    models: Mapping[str, Path]  # name that clients send → checkpoint directory with the tokenizer
    formats: Mapping[str, TextFormats] = field(default_factory=dict)  # of calls and thoughts, where the document names them
    tasks: Mapping[str, str] = field(default_factory=dict)  # of models, as their documents say; absent = as checkpoints do
    unknown_fields: Literal["refuse", "ignore"] = "ignore"  # of HTTP bodies; ignored ones are named in a header
    host: str = "127.0.0.1"
    http_port: int = 8000  # 0 = any free port
    grpc_port: int = 9000  # 0 = any free port
    picker_targets: str | None = None  # host:port of all replicas, for gateways of Kubernetes that ask where to send a request
    reuse_port: bool = False  # several gateways of one machine share the ports
    api_keys: frozenset[str] = field(default_factory=frozenset)  # plain; neither these nor a file = open
    api_keys_file: Path | None = None  # hashed, with names and scopes; looked at again when it changes
    metrics_access: Literal["open", "admin"] = "open"  # who may read /metrics
    shared_cache_models: frozenset[str] = field(default_factory=frozenset)  # prefix cache shared by all keys
    control_marker_models: frozenset[str] = field(default_factory=frozenset)  # markers in messages become control tokens
    plain_sampling_models: frozenset[str] = field(default_factory=frozenset)  # whose generation_config.json decides nothing
    tls: TlsFiles | None = None  # None = plain text
    cors_origins: tuple[str, ...] = ()  # whose pages may ask from a browser; "*" = all
    max_request_bytes: int = 4 * 2**20
    default_deadline_s: float = 600.0
    max_deadline_s: float = 86_400.0
    max_concurrent_requests: int = 4096  # beyond it 429, whatever the workers' queues say
    remote_prefill_min_tokens: int = 64
    remote_prefill_min_tokens_by_model: Mapping[str, int] = field(default_factory=dict)  # where a model differs
    placement_timeout_s: float = 30.0  # how long a request whose worker was lost before its first token looks for another
    wake_timeout_s_by_model: Mapping[str, float] = field(default_factory=dict)  # a request waits so long for a first worker
    refresh_s: float = 0.5  # between looks into the directory
    checks_ahead: bool = False  # the process that checks schemas is started before the first comes
    drain_timeout_s: float = 30.0  # at the stop, how long open streams may go on
    compositions: tuple[CompositionOfExperts, ...] = ()
    deployment_models: Mapping[str, str] = field(default_factory=dict)  # deploymentRef → name of a model served here
    document_revision: str = ""  # of the one document that is served here, see WorkerInfo; "" = nobody said
    endpoints: Mapping[str, ExternalEndpoint] = field(default_factory=dict)  # deploymentRef → where it is reached elsewhere
    routing: Literal["here", "replicas"] = "here"  # who decides: this process, or the router replicas of the directory


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundPorts:
    """Where a gateway listens."""

    host: str
    http_port: int
    grpc_port: int
