"""Number formats: how many bytes a value takes, and which format each part of a model uses (pure values).

Must not know: any model or accelerator.
"""

from __future__ import annotations

from dataclasses import dataclass

from antiphon.core.errors import InvalidInput

BYTES_PER_VALUE: dict[str, float] = {
    "fp32": 4.0,
    "bf16": 2.0,
    "fp16": 2.0,
    "fp8": 1.0,
    "int8": 1.0,
    "fp4": 0.5,
    "int4": 0.5,
}

# What an accelerator computes in when it lacks a format: the next wider one that keeps the values.
FALLBACK: dict[str, str] = {"fp4": "fp8", "int4": "int8", "fp8": "bf16", "int8": "bf16", "bf16": "fp16", "fp16": "fp32"}


def bytes_per_value(name: str) -> float:
    """Bytes of one value.

    Raises:
        InvalidInput: no format has that name.
    """
    try:
        return BYTES_PER_VALUE[name]
    except KeyError:
        raise InvalidInput(f"no number format {name!r}; known are {', '.join(BYTES_PER_VALUE)}", "format") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Formats:
    """The format of each part of a model that is served."""

    weights: str = "bf16"
    compute: str = "bf16"  # products with weights
    attention: str = "bf16"  # scores and weighted sums: an 8-bit KV cache is widened first by today's decode kernels
    kv: str = "bf16"  # KV of layers that see the whole context
    local_kv: str = "bf16"  # KV of layers with a chunk or window
    state: str = "fp32"  # recurrent state of linear attention
    a2f: str = "bf16"  # rows attention -> FFN
    f2a: str = "bf16"  # rows FFN -> attention

    def __post_init__(self) -> None:
        for name in (self.weights, self.compute, self.attention, self.kv, self.local_kv, self.state, self.a2f, self.f2a):
            bytes_per_value(name)
