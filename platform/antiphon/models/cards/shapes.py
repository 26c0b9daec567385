"""The shapes that the kernels are compiled and measured for: public models' own (control speed, data).

Must not know: kernels.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """Heads of one attention layer."""

    name: str
    num_heads: int
    num_kv_heads: int
    dim: int
    dim_v: int
    rotary: int
    normed: bool = False
    window: int = 0
    is_latent: bool = False  # V is the beginning of K


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertShape:
    """Experts of one layer."""

    name: str
    num_experts: int
    top_k: int
    hidden: int
    width: int
    num_groups: int = 1
    num_kept: int = 1
    counted: int = 0
    sigmoid: bool = False


ATTENTION = (
    AttentionShape(name="Llama-3.1-8B", num_heads=32, num_kv_heads=8, dim=128, dim_v=128, rotary=128),
    AttentionShape(name="Llama-3.2-1B", num_heads=32, num_kv_heads=8, dim=64, dim_v=64, rotary=64),
    AttentionShape(name="Qwen3-30B-A3B", num_heads=32, num_kv_heads=4, dim=128, dim_v=128, rotary=128, normed=True),
    AttentionShape(name="Gemma-3-12B", num_heads=16, num_kv_heads=8, dim=256, dim_v=256, rotary=256, normed=True, window=1024),
    AttentionShape(name="DeepSeek-V3, latent", num_heads=128, num_kv_heads=1, dim=576, dim_v=512, rotary=64, is_latent=True),
)

EXPERTS = (
    ExpertShape(name="Qwen3-30B-A3B", num_experts=128, top_k=8, hidden=2048, width=768),
    ExpertShape(
        name="DeepSeek-V3",
        num_experts=256,
        top_k=8,
        hidden=7168,
        width=2048,
        num_groups=8,
        num_kept=4,
        counted=2,
        sigmoid=True,
    ),
)

HIDDEN = (2048, 4096, 7168)
