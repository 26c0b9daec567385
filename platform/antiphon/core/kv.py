"""All KV-cache arithmetic in one place: layout, blocks, slots, and the ticket between prefill and decode (pure values).

    token t of a request  ->  block_ids[t // block_size_tokens], offset t % block_size_tokens
    slot of that token    =   block_id * block_size_tokens + offset

A layer caches one or more *planes* per token: ("k", K, H) and ("v", K, H) for grouped-query attention, one compressed
plane for latent attention. Must not know: tensors, or where caches live.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NewType

from antiphon.core.ids import WorkerId
from antiphon.core.request import RequestId

TransferId = NewType("TransferId", int)


@dataclass(frozen=True, slots=True, kw_only=True)
class KVPlane:
    """One cached tensor per layer: ``num_heads`` x ``head_dim`` values a token."""

    name: str
    num_heads: int
    head_dim: int

    @property
    def width(self) -> int:
        """Values per token and layer."""
        return self.num_heads * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class KVLayout:
    """How one model's KV is laid out; equal fingerprints mean that blocks can be handed over byte for byte."""

    num_layers: int
    planes: tuple[KVPlane, ...]
    block_size_tokens: int
    dtype: str  # float32, bfloat16
    itemsize_bytes: int

    @property
    def layer_token_bytes(self) -> int:
        """Bytes per token in one layer, all planes."""
        return sum(plane.width for plane in self.planes) * self.itemsize_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes per token in all layers."""
        return self.layer_token_bytes * self.num_layers

    @property
    def block_bytes(self) -> int:
        """Bytes per block in all layers."""
        return self.token_bytes * self.block_size_tokens

    @property
    def fingerprint(self) -> str:
        """Everything that must be equal at both ends of a hand-off; block sizes may differ, tokens travel."""
        planes = ",".join(f"{p.name}:{p.num_heads}x{p.head_dim}" for p in self.planes)
        return f"layers={self.num_layers};planes={planes};dtype={self.dtype}"

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class KVLoad:
    """The decode side's half of a hand-off: fetch KV of tokens [first_token, first_token + num_tokens) from a prefill worker."""

    request_id: RequestId
    prefill_worker: WorkerId
    token_ids: tuple[int, ...]  # the prompt up to the last token fetched
    first_token: int  # cached here already below this
    num_tokens: int
    block_ids: tuple[int, ...]  # of the request, from token 0
    deadline_s: float  # seconds from now
    traceparent: str | None = None
    cache_salt: str = ""
    tenant: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVTarget:
    """The prefill side's half of a hand-off: where computed KV goes. ``peer`` is the connector's handle of the asker."""

    peer: int
    transfer_id: TransferId
    first_token: int  # the asker has KV below this
    num_tokens: int
