"""Who is who on the data plane: roles, worker ids, epochs, endpoints, shards (pure values).

Must not know: where workers are registered or how they talk.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NewType

WorkerId = NewType("WorkerId", str)  # "<deployment>/<pool>/<index>"; stable over restarts
Epoch = NewType("Epoch", int)  # grows with every start of a worker; messages of an older epoch are dropped


class Role(enum.Enum):
    """What a worker holds and does.

    MONOLITH and DECODE hold whole layers, their FFN half behind the loopback transport; PREFILL too, and it hands its KV over.
    ATTENTION holds no FFN weights, FFN holds nothing else.
    """

    MONOLITH = "monolith"
    PREFILL = "prefill"
    DECODE = "decode"
    ATTENTION = "attention"
    FFN = "ffn"

    @property
    def holds_attention(self) -> bool:
        """True when the worker owns a KV cache, attention halves, embeddings, head and sampler."""
        return self is not Role.FFN

    @property
    def holds_ffn(self) -> bool:
        """True when the worker owns FFN weights."""
        return self is not Role.ATTENTION

    @property
    def generates(self) -> bool:
        """True when the gateway may send requests to it."""
        return self in (Role.MONOLITH, Role.DECODE, Role.ATTENTION)


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Addresses of a worker: ``rpc`` for control and requests, ``data`` for the transport (may be equal)."""

    rpc: str  # host:port
    data: str = ""  # transport address; its scheme names the transport: grpc://host:port


@dataclass(frozen=True, slots=True, kw_only=True)
class FFNShard:
    """The part of every FFN one worker holds: slice ``tensor_index`` of ``num_tensor`` slices of the intermediate
    dimension, and group ``expert_index`` of ``num_expert`` groups of experts.
    """

    tensor_index: int = 0
    num_tensor: int = 1
    expert_index: int = 0
    num_expert: int = 1

    @property
    def index(self) -> int:
        """Position among all shards, expert-major."""
        return self.expert_index * self.num_tensor + self.tensor_index

    @property
    def num_shards(self) -> int:
        """How many shards make the whole FFN."""
        return self.num_tensor * self.num_expert

    @classmethod
    def of(cls, index: int, *, num_tensor: int, num_expert: int = 1) -> FFNShard:
        """The shard at ``index`` of num_tensor x num_expert shards."""
        return cls(
            tensor_index=index % num_tensor,
            num_tensor=num_tensor,
            expert_index=index // num_tensor,
            num_expert=num_expert,
        )


def slice_bounds(size: int, index: int, num_slices: int) -> tuple[int, int]:
    """Half-open bounds of slice ``index`` of ``num_slices`` near-equal contiguous slices of ``size``."""
    return size * index // num_slices, size * (index + 1) // num_slices
