"""What both clients are made from, checked once (values). Must not know: connections."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from antiphon.client.retry import RetryPolicy
from antiphon.client.wire import GenerateOptions
from antiphon.core.errors import InvalidInput
from antiphon.rpc.client_channel import Metadata, Tls

DEFAULT_ENDPOINT = "127.0.0.1:9000"
UNARY_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """A client's settings."""

    endpoint: str = DEFAULT_ENDPOINT  # host:port of the gRPC door
    api_key: str | None = None
    tls: Tls | None = None  # None = plain text
    timeout_s: float = 600.0  # of generate and stream, retries included, where a call does not say
    retry: RetryPolicy = field(default_factory=RetryPolicy)

    def __post_init__(self) -> None:
        if self.api_key is not None:
            _check_header("api_key", self.api_key)
        _check_timeout(self.timeout_s)

    def metadata(self, options: GenerateOptions | None = None) -> Metadata:
        """What travels beside a call's message."""
        metadata = [] if self.api_key is None else [("authorization", f"Bearer {self.api_key}")]
        if options is not None and "traceparent" in options:
            _check_header("traceparent", options["traceparent"])
            metadata.append(("traceparent", options["traceparent"]))
        return metadata

    def timeout_of(self, options: GenerateOptions) -> float:
        """Seconds that a call has.

        Raises:
            InvalidInput: it is not above 0.
        """
        timeout_s = options.get("timeout_s", self.timeout_s)
        _check_timeout(timeout_s)
        return timeout_s


def _check_timeout(timeout_s: float) -> None:
    if not isinstance(timeout_s, int | float) or not 0 < timeout_s < math.inf:
        raise InvalidInput("timeout_s: must be a number above 0", "timeout_s")


def _check_header(name: str, value: str) -> None:
    if not (isinstance(value, str) and value.isascii() and value.isprintable()):
        raise InvalidInput(f"{name}: only printable ASCII can travel in a header", name)
