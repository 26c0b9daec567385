"""All KV-cache arithmetic in one place: layout, blocks, slots, and the ticket between prefill and decode (pure values).

    token t of a request  ->  block_ids[t // block_size_tokens], offset t % block_size_tokens
    slot of that token    =   block_id * block_size_tokens + offset

A layer caches one or more *planes* per token: ("k", K, H) and ("v", K, H) for grouped-query attention, one compressed
plane for latent attention. A layer of linear attention or of convolutions has *state planes* instead, of one size per sequence:

    a sequence holds two state slots:   step reads one ──► writes the other      so a step that fails can be computed again
    a snapshot is a slot that keeps the state at a block's end, named by the same chain of hashes as the block

Must not know: tensors, or where caches live.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NewType

from antiphon.core.ids import WorkerId
from antiphon.core.request import RequestId

TransferId = NewType("TransferId", int)
LIVE_STATES = 2  # state slots of a sequence that is computed
_SNAPSHOT_SHARE = 8  # one part in so many of a cache's memory
_MIN_SNAPSHOTS = 8


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
class StatePlane:
    """One tensor of a layer's state: of this shape for each sequence, however long that is."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    itemsize_bytes: int

    @property
    def num_bytes(self) -> int:
        """Bytes per sequence and layer."""
        return math.prod(self.shape) * self.itemsize_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class KVLayout:
    """How one model's KV and states are laid out; equal fingerprints mean that both can be handed over byte for byte."""

    num_layers: int
    planes: tuple[KVPlane, ...]
    block_size_tokens: int
    dtype: str  # float32, bfloat16
    itemsize_bytes: int
    states: tuple[StatePlane, ...] = ()  # of each layer that has a state
    state_layers: tuple[int, ...] = ()  # these have, and cache nothing per token

    @property
    def has_state(self) -> bool:
        """Whether a sequence is more than its KV: whoever takes tokens back, or starts within a sequence, needs its state there."""
        return bool(self.state_layers)

    @property
    def kv_layers(self) -> tuple[int, ...]:
        """Layers that cache per token."""
        return tuple(layer for layer in range(self.num_layers) if layer not in self.state_layers)

    @property
    def layer_token_bytes(self) -> int:
        """Bytes per token in one layer that caches per token, all planes."""
        return sum(plane.width for plane in self.planes) * self.itemsize_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes per token in all layers."""
        return self.layer_token_bytes * (self.num_layers - len(self.state_layers))

    @property
    def state_bytes(self) -> int:
        """Bytes of one state slot: a sequence's state at one place, in all layers; 0 where there is none."""
        return sum(plane.num_bytes for plane in self.states) * len(self.state_layers)

    def sequence_bytes(self, num_tokens: int) -> int:
        """Bytes that a running sequence of so many tokens holds: its blocks and its state slots."""
        return self.num_blocks_for(num_tokens) * self.block_bytes + LIVE_STATES * self.state_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes per block in all layers."""
        return self.token_bytes * self.block_size_tokens

    @property
    def fingerprint(self) -> str:
        """Everything that must be equal at both ends of a hand-off; block sizes may differ, tokens travel."""
        planes = ",".join(f"{p.name}:{p.num_heads}x{p.head_dim}" for p in self.planes)
        said = f"layers={self.num_layers};planes={planes};dtype={self.dtype}"
        if not self.has_state:
            return said
        states = ",".join(f"{p.name}:{'x'.join(map(str, p.shape))}:{p.dtype}" for p in self.states)
        return f"{said};states={states};state_layers={','.join(map(str, self.state_layers))}"

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
    state_slot: int | None = None  # where the state behind the last token fetched goes; None = the model has none


@dataclass(frozen=True, slots=True, kw_only=True)
class KVTarget:
    """The prefill side's half of a hand-off: where computed KV goes. ``peer`` is the connector's handle of the asker."""

    peer: int
    transfer_id: TransferId
    first_token: int  # the asker has KV below this
    num_tokens: int


def num_state_slots(
    *, max_num_seqs: int, memory_bytes: int, state_bytes: int, prefix_caching: bool, num_snapshots: int | None = None
) -> int:
    """State slots of a worker's cache: those of as many sequences as may run, and those of snapshots for equal prefixes.

    Args:
        max_num_seqs: sequences that may run at once.
        memory_bytes: of the whole cache.
        state_bytes: of one slot, all layers.
        prefix_caching: whether snapshots are kept.
        num_snapshots: how many at most; None = an eighth of the memory, and 8 at least.
    """
    if not prefix_caching:
        num_snapshots = 0
    elif num_snapshots is None:
        num_snapshots = max(_MIN_SNAPSHOTS, memory_bytes // _SNAPSHOT_SHARE // state_bytes)
    return LIVE_STATES * max_num_seqs + num_snapshots
