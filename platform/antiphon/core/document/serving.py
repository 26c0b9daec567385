"""Parts of a deployment's document about answering: the engine's limits, the doors, the directory (control speed).

Must not know: pools, models.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field, field_validator, model_validator

from antiphon.core.document.part import FieldsError, Line, Model, as_tuple

# A scheme, a host and at most a port, as browsers write it: without a path, nor a slash at the end.
_ORIGIN: Final = r"^(\*|[a-z][a-z0-9+.-]*://(\[[0-9a-f:]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?)$"


class SchedulerSpec(Model):
    """Limits of the engine's step."""

    max_num_seqs: int = Field(default=64, ge=1, le=65_536, description="Requests running at once, per worker.")
    max_num_batched_tokens: int = Field(default=1024, ge=16, le=1_048_576, description="Token budget of one step.")
    max_queued_requests: int = Field(default=256, ge=0, le=1_000_000, description="Waiting requests, per worker, before 429.")
    remote_prefill_min_tokens: int = Field(
        default=64,
        ge=1,
        le=10_000_000,
        description="Prompts with fewer uncached tokens are prefilled where they decode.",
    )
    kv_lease_s: float = Field(default=30.0, gt=0, le=3600, description="A KV hand-off without progress for this long fails.")


class DoorTlsSpec(Model):
    """The doors' certificate; files that change are taken up for new connections, open streams go on."""

    certificate_file: Line = Field(description="PEM: the certificate and its chain.", min_length=1, max_length=4096)
    key_file: Line = Field(description="PEM: its private key, without a password.", min_length=1, max_length=4096)


class DraftModelSpec(Model):
    """A small model with the same vocabulary, which each generating worker runs beside the larger one."""

    uri: Line | None = Field(
        default=None,
        description="Where its checkpoint is, as in model.uri; None = deploymentRef says it.",
        min_length=1,
        max_length=1024,
    )
    revision: Line | None = Field(default=None, description="Revision of the checkpoint; None = the uri's default.", max_length=128)
    deployment_ref: Line | None = Field(
        default=None,
        description="metadata.name of another LLMDeployment, whose checkpoint it is (Kubernetes, and serve of both documents): its "
        "workers are not asked; None = uri.",
        min_length=1,
        max_length=63,
    )

    @model_validator(mode="after")
    def _is_somewhere(self) -> DraftModelSpec:
        if (self.uri is None) == (self.deployment_ref is None):
            raise FieldsError([("deploymentRef", "exactly one of uri and deploymentRef is needed")])
        if self.revision is not None and self.uri is None:
            raise FieldsError([("revision", "goes with uri; the deployment says its own")])
        return self


class SpeculationSpec(Model):
    """Guesses of the next tokens, verified in one step; every answer is the same as without."""

    drafter: Literal["ngram", "model", "mtp", "layers"] = Field(
        default="ngram",
        description="Who guesses; ngram = what followed the last tokens where they stood in the prompt or answer before, model = a "
        "smaller model, mtp = the checkpoint's layers for multi-token prediction, layers = the model's own first layers.",
    )
    max_drafts: int = Field(
        default=8, ge=1, le=64, description="Guesses of one request in one step, at most; how many are worth it is measured."
    )
    model: DraftModelSpec | None = Field(default=None, description="The smaller model of drafter model; None with the others.")
    layers: int | None = Field(
        default=None, ge=1, le=10_000, description="How many layers guess, of drafter layers; None with the others."
    )
    cache_tokens: int = Field(
        default=16_384,
        ge=64,
        le=100_000_000,
        description="Tokens whose keys and values a drafter of layers keeps, over all requests of a worker, beside the cache.",
    )

    @model_validator(mode="after")
    def _has_its_own(self) -> SpeculationSpec:
        found = [
            (name, f"drafter {name} needs it" if value is None else f"goes with drafter {name}, and this one is {self.drafter}")
            for name, value in (("model", self.model), ("layers", self.layers))
            if (value is None) == (self.drafter == name)
        ]
        if found:
            raise FieldsError(found)
        return self


class EndpointSpec(Model):
    """Where clients connect."""

    host: Line = Field(default="127.0.0.1", description="Address that the gateway binds.", max_length=253)
    http_port: int = Field(default=8000, ge=0, le=65_535, description="OpenAI-compatible HTTP; 0 = any free port.")
    grpc_port: int = Field(default=9000, ge=0, le=65_535, description="gRPC; 0 = any free port.")
    replicas: int = Field(default=1, ge=1, le=1000, description="Gateway replicas.")
    api_keys_env: Line | None = Field(
        default=None,
        description="Environment variable with the accepted API keys, comma-separated; None = open.",
        max_length=128,
    )
    api_keys_file: Line | None = Field(
        default=None,
        description="File of hashed API keys with tenant, scope and expiry (`antiphon keys`), e.g. of a mounted Secret; looked "
        "at again when it changes.",
        min_length=1,
        max_length=4096,
    )
    metrics_access: Literal["open", "admin"] = Field(
        default="open", description="Who may read /metrics: everybody, or keys of scope admin."
    )
    tls: DoorTlsSpec | None = Field(default=None, description="TLS at both doors; None = plain text.")
    cors_origins: tuple[Annotated[str, Field(pattern=_ORIGIN, max_length=512)], ...] = Field(
        default=(),
        description="Origins whose pages may ask this endpoint from a browser, such as https://app.example.org; * = all. "
        "The gateway's own page needs none. Where no key is asked for, other origins' pages are refused; so is, at a loopback "
        "address, a Host that is neither an address, a local name, nor one of these.",
        max_length=64,
    )
    picker_targets: str | None = Field(
        default=None,
        pattern=r"^[-._:\[\]A-Za-z0-9]+:[0-9]{1,5}$",
        max_length=300,
        description="host:port that resolves to all gateway replicas: the gRPC port then answers the Endpoint Picker Protocol of "
        "Kubernetes' Gateways; None = it does not. The operator sets it where kubernetes.gateway.inferencePool is true.",
    )
    max_request_bytes: int = Field(default=4_194_304, ge=1024, le=1 << 30, description="Largest request body.")
    default_deadline_s: float = Field(default=600.0, gt=0, le=86_400, description="Deadline of requests that bring none.")
    wake_timeout_s: float | None = Field(
        default=None,
        ge=0,
        le=86_400,
        description="How long a request waits while no worker is ready, before it is refused; None = 600 where a pool may scale "
        "to zero, else 0.",
    )
    unknown_fields: Literal["refuse", "ignore"] = Field(
        default="ignore",
        description="Fields of HTTP bodies that nobody knows: refused with 400, or ignored and named in a Warning header.",
    )

    _lists = field_validator("cors_origins", mode="before")(as_tuple)


class DirectorySpec(Model):
    """Where workers register."""

    redis_url: Line | None = Field(default=None, description="redis:// URL; None = an embedded store.", max_length=1024)
    lease_s: float = Field(default=5.0, gt=0.5, le=300, description="A worker that does not renew this long is gone.")
