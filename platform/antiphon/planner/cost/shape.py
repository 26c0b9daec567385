"""The shape of a model: what each layer caches, multiplies and holds (pure arithmetic).

Three attention designs and two FFN designs are all that differs between families; each says its sizes once, here. Must not
know: config files, number formats, or hardware.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property

FLOPS_PER_WEIGHT = 2.0  # a multiply-add with each weight, per row
# Kernels that one layer's half launches in a decode step, counted in open implementations with their usual fusions.
GROUPED_KERNELS = 7  # norm, q/k/v, rotary, KV write, attention, merge of its splits, output
LATENT_KERNELS = 14  # norm, 2 quantise, q down, norm, q up, absorb, kv down, norm, rotary + write, attention, merge, read, output
FACTORISED_KERNELS = 12  # norm, 2 quantise, q down, norm, q up, k/v, rotary, KV write, attention, merge, output
INDEXER_KERNELS = 5  # queries, key, head weights, scores, top-k
LINEAR_KERNELS = 9
ROUTER_KERNELS = 5  # gate, scores, top-k, weights, counts by expert
DENSE_KERNELS = 4  # norm, gate and up, activation, down
EXPERT_KERNELS = 6  # sort, quantise, gate and up, activation, down, weighted sum
LINEAR_PASSES = 5.0  # linear attention, per element of state: outer product, decay, accumulate, read-out product, read-out sum


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftmaxAttention:
    """Attention over cached positions; ``window`` None sees the whole context."""

    cached_values: int  # per token: what the KV cache keeps
    decode_flops: int  # per row and cached token
    prefill_flops: int  # per row and cached token, before weights are absorbed
    projection_weights: int
    num_heads: int  # of queries
    num_kv_heads: int  # that the cache can be split by
    core_flops: int  # per row and cached token, as kernels do them; ``decode_flops`` is what cost tables count
    kernels: int
    window: int | None = None  # tokens
    chosen: int | None = None  # tokens that an indexer picks of the cached ones; None = all are attended
    index_values: int = 0  # per token: keys of the indexer, cached beside
    index_flops: int = 0  # per row and cached token: scores of the indexer

    @classmethod
    def grouped(
        cls,
        *,
        hidden: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        window: int | None = None,
        has_output_gate: bool = False,
    ) -> SoftmaxAttention:
        """MHA, GQA or MQA: one key and one value per KV head; ``has_output_gate``: projected from the rows, a value each."""
        flops = 4 * num_heads * head_dim
        return cls(
            cached_values=2 * num_kv_heads * head_dim,
            decode_flops=flops,
            prefill_flops=flops,
            projection_weights=hidden * ((2 + has_output_gate) * num_heads * head_dim + 2 * num_kv_heads * head_dim),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            core_flops=flops,
            kernels=GROUPED_KERNELS,
            window=window,
        )

    @classmethod
    def latent(
        cls,
        *,
        hidden: int,
        num_heads: int,
        q_rank: int | None,
        kv_rank: int,
        nope_dim: int,
        rope_dim: int,
        value_dim: int,
    ) -> SoftmaxAttention:
        """MLA with absorbed weights: all heads read one latent of kv_rank + rope_dim values.

        The read-out is counted over the whole latent as published cost tables do, though its rope part is not read out.
        """
        latent = kv_rank + rope_dim
        query = num_heads * (nope_dim + rope_dim)
        query_weights = hidden * query if q_rank is None else hidden * q_rank + q_rank * query
        return cls(
            cached_values=latent,
            decode_flops=4 * num_heads * latent,
            prefill_flops=2 * num_heads * (nope_dim + rope_dim + value_dim),
            projection_weights=query_weights
            + hidden * latent
            + kv_rank * num_heads * (nope_dim + value_dim)
            + num_heads * value_dim * hidden,
            num_heads=num_heads,
            num_kv_heads=1,
            core_flops=2 * num_heads * (latent + kv_rank),
            kernels=LATENT_KERNELS,
        )

    def indexed(self, *, hidden: int, q_rank: int, num_heads: int, head_dim: int, chosen: int) -> SoftmaxAttention:
        """The same with sparse attention: an indexer scores every cached token, and ``chosen`` of them are attended."""
        weights = q_rank * num_heads * head_dim + hidden * head_dim + hidden * num_heads
        return replace(
            self,
            projection_weights=self.projection_weights + weights,
            prefill_flops=self.core_flops,  # chosen tokens differ by row: prompts run absorbed too
            kernels=self.kernels + INDEXER_KERNELS,
            chosen=chosen,
            index_values=head_dim,
            index_flops=2 * num_heads * head_dim,
        )

    @classmethod
    def factorised(cls, *, hidden: int, num_heads: int, num_kv_heads: int, head_dim: int, q_rank: int) -> SoftmaxAttention:
        """MFA: query heads grow out of a low rank and share a few (one) wide KV heads."""
        flops = 4 * num_heads * head_dim
        return cls(
            cached_values=2 * num_kv_heads * head_dim,
            decode_flops=flops,
            prefill_flops=flops,
            projection_weights=hidden * q_rank
            + q_rank * num_heads * head_dim
            + 2 * hidden * num_kv_heads * head_dim
            + num_heads * head_dim * hidden,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            core_flops=flops,
            kernels=FACTORISED_KERNELS,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearAttention:
    """Attention with a recurrent state that is read and written once per row, whatever the context."""

    state_values: int
    projection_weights: int
    num_heads: int
    kernels: int = LINEAR_KERNELS

    @classmethod
    def gated(cls, *, hidden: int, num_heads: int, head_dim: int) -> LinearAttention:
        """A head_dim x head_dim state per head; q, k, v, output gate and output projections."""
        return cls(
            state_values=num_heads * head_dim * head_dim,
            projection_weights=5 * hidden * num_heads * head_dim,
            num_heads=num_heads,
        )

    @classmethod
    def delta(
        cls,
        *,
        hidden: int,
        num_key_heads: int,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        num_taps: int,
        low_rank: int | None = None,
    ) -> LinearAttention:
        """The gated delta rule: a key_dim x value_dim state per head, and the last inputs of a convolution over q, k and v.

        ``low_rank``: of the projections that give a decay per channel and the output's gate; None = a decay per head.
        """
        keys, values = num_key_heads * key_dim, num_heads * value_dim
        gates = hidden * (values + num_heads) if low_rank is None else low_rank * (2 * hidden + num_heads * key_dim + values)
        return cls(
            state_values=num_heads * key_dim * value_dim + (num_taps - 1) * (2 * keys + values),
            projection_weights=hidden * (2 * keys + 2 * values + num_heads) + gates,
            num_heads=num_heads,
        )


Attention = SoftmaxAttention | LinearAttention


@dataclass(frozen=True, slots=True, kw_only=True)
class FFN:
    """A dense FFN (num_experts 0) or a mixture of experts with optional shared weights."""

    always_weights: int  # the dense FFN, or the shared experts
    num_experts: int = 0
    experts_per_row: int = 0
    expert_weights: int = 0  # of one expert
    router_weights: int = 0

    @property
    def kernels(self) -> int:
        """Launched by the FFN half."""
        return EXPERT_KERNELS if self.num_experts else DENSE_KERNELS

    @property
    def activated_weights(self) -> int:
        """Weights that one row multiplies, the router's aside."""
        return self.always_weights + self.experts_per_row * self.expert_weights

    @property
    def total_weights(self) -> int:
        """Weights to hold, the router's aside."""
        return self.always_weights + self.num_experts * self.expert_weights

    @property
    def sparsity(self) -> float:
        """Activated share of the weights; 1 for a dense FFN."""
        return self.activated_weights / self.total_weights

    @classmethod
    def dense(cls, hidden: int, intermediate: int, num_matrices: int = 3) -> FFN:
        """Gated (three matrices) or plain (two)."""
        return cls(always_weights=num_matrices * hidden * intermediate)

    @classmethod
    def experts(cls, *, hidden: int, intermediate: int, num: int, per_row: int, shared_intermediate: int = 0) -> FFN:
        """Gated experts of one size, with shared experts of a total intermediate size."""
        return cls(
            always_weights=3 * hidden * shared_intermediate,
            num_experts=num,
            experts_per_row=per_row,
            expert_weights=3 * hidden * intermediate,
            router_weights=hidden * num,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One decoder layer."""

    attention: Attention
    ffn: FFN

    @property
    def attention_kernels(self) -> int:
        """Launched by the attention half, the router's with them."""
        return self.attention.kernels + (ROUTER_KERNELS if self.ffn.num_experts else 0)

    def kv_parts(self, tensor: int) -> int:
        """Parts that the layer's cache or state is cut into when ``tensor`` cards share its heads; more cards hold copies."""
        attention = self.attention
        return min(tensor, attention.num_heads if isinstance(attention, LinearAttention) else attention.num_kv_heads)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A decoder-only model. Not slotted: sums over its layers are computed once and kept."""

    name: str
    hidden_size: int
    vocab_size: int
    tied_embeddings: bool
    layers: tuple[Layer, ...]

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)

    @cached_property
    def kinds(self) -> tuple[tuple[Layer, int], ...]:
        """Distinct layers with how many there are of each, most frequent last."""
        return tuple(sorted(Counter(self.layers).items(), key=lambda pair: pair[1]))

    @property
    def embedding_weights(self) -> int:
        """Embedding table and, unless tied, the LM head."""
        return self.hidden_size * self.vocab_size * (1 if self.tied_embeddings else 2)

    @property
    def head_weights(self) -> int:
        """The LM head's matrix, whether or not the embedding shares it."""
        return self.hidden_size * self.vocab_size

    @property
    def num_heads(self) -> int:
        """Fewest query heads of a layer: as many cards can share an attention at most."""
        return min(layer.attention.num_heads for layer, _ in self.kinds)

    @cached_property
    def attention_weights(self) -> int:
        """Projections of all layers."""
        return sum(layer.attention.projection_weights for layer in self.layers)

    @cached_property
    def router_weights(self) -> int:
        """MoE gates of all layers; they live with attention."""
        return sum(layer.ffn.router_weights for layer in self.layers)

    @property
    def norm_weights(self) -> int:
        """Two norms a layer and a last one."""
        return (2 * self.num_layers + 1) * self.hidden_size

    @cached_property
    def attention_side_weights(self) -> int:
        """What an attention worker holds: projections, gates, norms, embedding and head."""
        return self.attention_weights + self.router_weights + self.norm_weights + self.embedding_weights

    @cached_property
    def ffn_weights(self) -> int:
        """What the FFN workers hold together."""
        return sum(layer.ffn.total_weights for layer in self.layers)

    @property
    def total_weights(self) -> int:
        """Every parameter."""
        return self.attention_side_weights + self.ffn_weights

    @property
    def activated_weights(self) -> int:
        """Parameters that one token uses, embedding and head included."""
        return self.attention_side_weights + sum(layer.ffn.activated_weights for layer in self.layers)

    @property
    def experts(self) -> FFN | None:
        """The most frequent MoE FFN; None in a dense model."""
        mixtures = Counter(layer.ffn for layer in self.layers if layer.ffn.num_experts)
        return mixtures.most_common(1)[0][0] if mixtures else None
