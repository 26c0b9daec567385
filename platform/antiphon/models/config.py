"""What a decoder is, in our own words: one description per model, made by its family from a Hugging Face config (pure values).

Every field that changes results is here; a family refuses configs that it can't express. The attention worker and the FFN worker
build their halves from the same description.

    layer i:  x += out_norm(attention(input_norm(x)))          norms that a layer has not are the identity
              x += ffn_out_norm(ffn(ffn_norm(x)))
    a shortcut of layer i reads ffn_norm(x) with the FFN and joins x at the end of layer i + 1 (LongCat-Flash)

Must not know: tensors, where weights are.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from hashlib import blake2b
from typing import Literal

from antiphon.core.kv import KVPlane, StatePlane
from antiphon.models.layers.rope_config import RopeConfig

# "gpt_oss" is g·sigmoid(1.702 g)·(u + 1) of the gate g and the up projection u; the others are act(g)·u.
Activation = Literal["silu", "gelu_tanh", "gelu", "gpt_oss"]
NormKind = Literal["rms", "rms_plus_one", "layer"]  # weight; 1 + weight (Gemma); mean and variance, weight and bias
NormPlace = Literal["input", "attention_out", "ffn", "ffn_out"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionConfig:
    """Grouped-query attention of one layer; with ``q_rank``, multi-matrix factorization attention (Step-3, arXiv 2412.19255)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig
    scale: float  # on q·k
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: Literal["none", "head", "whole"] = "none"  # norm on q and k before the rotation: per head, or over all heads at once
    qkv_clip: float | None = None  # bound on the magnitude of q, k and v before the rotation
    q_rank: int | None = None  # q = expand(norm(project(x))) over this many dimensions; None = one projection
    sliding_window: int | None = None  # tokens seen, the current one included; None = all
    softcap: float | None = None  # c·tanh(score / c) on scores
    has_head_gate: bool = False  # each head's result times the sigmoid of a projection of the row
    has_sinks: bool = False  # a learned logit per head beside the scores, which takes a share of the softmax
    has_output_gate: bool = False  # sigmoid(gate(x)) on each value that attention gives; q_proj holds each head's q and gate

    @property
    def planes(self) -> tuple[KVPlane, ...]:
        """What the layer caches per token."""
        return (
            KVPlane(name="k", num_heads=self.num_kv_heads, head_dim=self.head_dim),
            KVPlane(name="v", num_heads=self.num_kv_heads, head_dim=self.head_dim),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexConfig:
    """The lightning indexer of sparse attention (DeepSeek-V3.2-Exp's report §2.1): a row sees ``top_k`` tokens of its context."""

    num_heads: int
    head_dim: int  # the leading ``rope_dim`` of the attention's are rotated
    top_k: int
    interleaved: bool = False  # neighbouring dimensions against each other (GLM-5), not halves


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttentionConfig:
    """Multi-head latent attention (MLA, arXiv 2405.04434): one latent and one rotated key per token are cached for all heads."""

    num_heads: int
    q_rank: int | None  # None = q in one projection
    kv_rank: int
    nope_dim: int  # of a q or k head: not rotated
    rope_dim: int  # rotated; k's is shared by all heads
    v_dim: int
    rope: RopeConfig
    scale: float  # on q·k
    interleaved: bool  # the checkpoint rotates neighbouring dimensions against each other, not halves
    norm_eps: float  # of the norms on the latents
    bias: bool = False  # on the projections from and to the hidden size
    q_factor: float = 1.0  # on q
    kv_factor: float = 1.0  # on the normed latent
    index: IndexConfig | None = None  # None = a row sees all of its context

    @property
    def planes(self) -> tuple[KVPlane, ...]:
        """What the layer caches per token: the normed latent and, behind it, the rotated key; the index's key."""
        latent = KVPlane(name="latent", num_heads=1, head_dim=self.kv_rank + self.rope_dim)
        return (latent,) if self.index is None else (latent, KVPlane(name="index", num_heads=1, head_dim=self.index.head_dim))


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaConfig:
    """The gated delta rule of one layer (arXiv 2412.06464), its decay per head or (Kimi Delta Attention, arXiv 2510.26692) per
    channel of the key. q, k and v pass a causal convolution of ``kernel_size`` tokens; a norm with a gate is on what is read.

    Per head and token, S [key_dim, value_dim]:  S = decay·S;  S += k (beta (v - S^T k))^T;  out = S^T q
    """

    num_key_heads: int  # of q and k; each serves num_heads / num_key_heads heads
    num_heads: int  # of v and of the state
    key_dim: int
    value_dim: int
    kernel_size: int
    form: Literal["by_key_head", "split", "kimi"]  # how the checkpoint has the projections
    norm_eps: float
    rope: None = None  # order is in the state

    @property
    def conv_width(self) -> int:
        """Channels of the convolution: q, k and v."""
        return 2 * self.num_key_heads * self.key_dim + self.num_heads * self.value_dim

    @property
    def planes(self) -> tuple[KVPlane, ...]:
        """Nothing is cached per token."""
        return ()

    def states(self, dtype: str, itemsize_bytes: int) -> tuple[StatePlane, ...]:
        """What is kept per sequence: the convolution's last inputs in the compute format, and S in fp32."""
        tail = (self.kernel_size - 1, self.conv_width)
        return (
            StatePlane(name="conv", shape=tail, dtype=dtype, itemsize_bytes=itemsize_bytes),
            StatePlane(name="delta", shape=(self.num_heads, self.key_dim, self.value_dim), dtype="float32", itemsize_bytes=4),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ShortConvConfig:
    """A gated short convolution in attention's place (LFM2): out(c · conv(b · x)), with b, c and x one projection of the rows."""

    width: int
    kernel_size: int
    bias: bool = False
    rope: None = None

    @property
    def planes(self) -> tuple[KVPlane, ...]:
        """Nothing is cached per token."""
        return ()

    def states(self, dtype: str, itemsize_bytes: int) -> tuple[StatePlane, ...]:
        """What is kept per sequence: the convolution's last inputs."""
        return (StatePlane(name="conv", shape=(self.kernel_size - 1, self.width), dtype=dtype, itemsize_bytes=itemsize_bytes),)


StateConfig = DeltaConfig | ShortConvConfig  # layers that remember per sequence
MixerConfig = AttentionConfig | LatentAttentionConfig | DeltaConfig | ShortConvConfig  # what mixes tokens in a layer


@dataclass(frozen=True, slots=True, kw_only=True)
class FFNConfig:
    """A dense gated FFN: down(act(gate(x)) * up(x))."""

    intermediate_size: int
    activation: Activation = "silu"
    bias: bool = False
    limit: float | None = None  # bound on act(gate) from above and on up both ways; gpt_oss bounds the gate before it acts


@dataclass(frozen=True, slots=True, kw_only=True)
class GateConfig:
    """How a row chooses experts and weights them; ``models.experts.gates`` computes it.

    Scores are over routed experts first, then null experts (which do nothing), then identity experts (which return the row).
    """

    num_experts: int  # with weights
    top_k: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    choice: Literal["top_k", "group_limited", "one_per_group_slot", "sparse_mixer"] = "top_k"
    num_groups: int = 1
    num_kept_groups: int = 1  # group_limited: experts outside the best groups can't be chosen
    group_score: Literal["max", "top2_sum"] = "max"
    has_logit_bias: bool = False  # on the logits
    has_correction_bias: bool = False  # added to scores for the choice only (arXiv 2408.15664)
    has_expert_scale: bool = False  # a learned factor per expert on its weight
    renormalise: bool = False  # weights of the chosen experts with weights of their own sum to 1
    scale: float = 1.0  # on all weights
    mixer_jitter: float = 0.0  # sparse_mixer's threshold
    num_null: int = 0
    num_identity: int = 0

    @property
    def num_choices(self) -> int:
        """Logits per row."""
        return self.num_experts + self.num_null + self.num_identity


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEConfig:
    """A mixture of gated experts, and the shared expert that every row takes (0 wide: none)."""

    gate: GateConfig
    intermediate_size: int  # of one expert
    activation: Activation = "silu"
    bias: bool = False  # of the routed experts' projections
    limit: float | None = None  # see FFNConfig; of the routed experts
    shared_intermediate_size: int = 0
    shared_limit: float | None = None
    has_shared_gate: bool = False  # sigmoid(x·w) on the shared expert

    @property
    def num_ids(self) -> int:
        """Expert ids on the wire: the routed experts and, last, the shared one."""
        return self.gate.num_experts + (self.shared_intermediate_size > 0)

    @property
    def experts_per_row(self) -> int:
        """Ids that travel with a row."""
        return self.gate.top_k + (self.shared_intermediate_size > 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerNames:
    """Checkpoint names within a layer, after its prefix; ``{e}`` is the expert. The defaults are those most families share."""

    input_norm: str = "input_layernorm"
    attention_out_norm: str = "post_attention_layernorm"
    ffn_norm: str = "post_attention_layernorm"
    ffn_out_norm: str = "post_feedforward_layernorm"
    attention: str = "self_attn."
    attention_out: str = "o_proj"
    q_norm: str = "q_norm"
    k_norm: str = "k_norm"
    sinks: str = "sinks"
    head_gate: str = "g_proj"
    q_expand: str = "q_b_proj"
    q_rank_norm: str = "q_a_layernorm"
    ffn: str = "mlp."  # of a dense FFN
    router: str = "mlp.gate.weight"
    correction_bias: str = "mlp.gate.e_score_correction_bias"
    expert_scale: str = "mlp.router_scale"
    expert: str = "mlp.experts.{e}."
    router_bias: str = "mlp.router.bias"
    stacked_experts: str | None = None  # prefix of [E, ...] tensors that hold all experts; None = each expert has its own
    # Prefix of "gate_up_proj" [E, D, 2W], columns of gate and up in turn, and "down_proj" [E, W, D], or of their MXFP4 blocks.
    fused_experts: str | None = None
    shared: str = "mlp.shared_expert."
    shared_gate: str = "mlp.shared_expert_gate.weight"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    expert_gate: str = "gate_proj"
    expert_up: str = "up_proj"
    expert_down: str = "down_proj"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerConfig:
    """One decoder layer: its two halves, and where its tensors are."""

    attention: MixerConfig
    ffn: FFNConfig | MoEConfig
    shortcut: MoEConfig | None = None
    norms: frozenset[NormPlace] = frozenset(("input", "ffn"))
    prefix: str = ""
    names: LayerNames = field(default_factory=LayerNames)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorNames:
    """Checkpoint names outside the layers."""

    embed: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm"
    lm_head: str = "lm_head"


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A whole decoder."""

    family: str
    hidden_size: int
    vocab_size: int
    max_position: int
    norm_eps: float
    tie_embeddings: bool
    layers: tuple[LayerConfig, ...]
    norm: NormKind = "rms"
    embed_scale: float | None = None  # on embeddings, rounded to the compute format; None = 1
    logit_softcap: float | None = None  # c·tanh(logits / c)
    lm_head_bias: bool = False
    names: TensorNames = field(default_factory=TensorNames)
    eos_token_ids: tuple[int, ...] = ()

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)

    @cached_property
    def ffns(self) -> tuple[FFNConfig | MoEConfig | None, ...]:
        """What an FFN worker computes, by the layer number on the wire: the layers' FFNs, then their shortcuts (None: has none)."""
        shortcuts = tuple(layer.shortcut for layer in self.layers)
        return tuple(layer.ffn for layer in self.layers) + (shortcuts if any(shortcuts) else ())

    @property
    def num_experts(self) -> int:
        """Routed experts of a sparse layer, of the one with most; 0 where every FFN is dense."""
        return max((ffn.gate.num_experts for ffn in self.ffns if isinstance(ffn, MoEConfig)), default=0)

    @property
    def num_streams(self) -> int:
        """Exchanges of one ubatch that may be in flight at once."""
        return 1 if len(self.ffns) == self.num_layers else 2

    @cached_property
    def fingerprint(self) -> str:
        """Short digest over every field; equal for peers that compute the same function."""
        return blake2b(json.dumps(asdict(self), sort_keys=True, default=sorted).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionConfig:
    """A module for multi-token prediction (DeepSeek-V3's report §2.2): one layer over a projection of two normed inputs.

        h'[i] = project([embedding_norm(embed(token[i + depth])); hidden_norm(h[i])])       depth 1, 2, ... of module 0, 1, ...

    h is what the model (behind its last norm) or the module before makes of the tokens up to i. What the layer makes of h' goes
    through the module's own norm into the head, and tells token[i + depth + 1].
    """

    decoder: DecoderConfig  # of one layer; the embedding is the model's
    embedding_norm: str  # checkpoint names
    hidden_norm: str
    projection: str
    hands_on_normed: bool = False  # behind its own norm: what the next module, or it once more, reads of it
