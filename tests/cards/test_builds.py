"""Every kernel compiled for compute capability 8.0 and 9.0 on the shapes that models have: no card is needed.

Triton compiles what a card then refuses to launch: shared memory is compared with what a card has, and a kernel that spills
registers is one that nobody meant. Must run without ``TRITON_INTERPRET``; ``make test`` runs this file in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from antiphon.models.cards import ahead, decode, experts, gate, prefill, rope, rows
from antiphon.models.cards.shapes import ATTENTION, EXPERTS, HIDDEN, AttentionShape, ExpertShape
from antiphon.models.cards.tuning import SHARED_BYTES

LONG, INT, FLOAT, BFLOAT = torch.int64, torch.int32, torch.float32, torch.bfloat16
Run = Callable[[], object]


def empty(*shape: int, dtype: torch.dtype = BFLOAT) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def pages(shape: AttentionShape, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    k = empty(160_000, shape.num_kv_heads, shape.dim, dtype=dtype)
    return k, k[..., : shape.dim_v] if shape.is_latent else empty(160_000, shape.num_kv_heads, shape.dim_v, dtype=dtype)


def decoding(shape: AttentionShape, dtype: torch.dtype) -> Run:
    q, table = empty(32, shape.num_heads, shape.dim, dtype=dtype), empty(32, 512, dtype=INT)
    return lambda: decode.decode_attention(q, *pages(shape, dtype), table, empty(32, dtype=LONG), 16, 0.1, shape.window, 4)


def prefilling(shape: AttentionShape, dtype: torch.dtype) -> Run:
    q, table, chunks = empty(512, shape.num_heads, shape.dim, dtype=dtype), empty(4, 512, dtype=INT), [empty(4, dtype=LONG)] * 3
    return lambda: prefill.prefill_attention(q, *pages(shape, dtype), table, *chunks, 512, 16, 0.1, shape.window)


def rotating(shape: AttentionShape) -> Run:
    qkv = empty(32, (shape.num_heads + 2 * shape.num_kv_heads) * shape.dim)
    angles, at = empty(4096, shape.rotary // 2, dtype=FLOAT), empty(32, dtype=LONG)
    norm = empty(shape.dim) if shape.normed else None
    return lambda: rope.rope_and_cache(qkv, angles, angles, at, at, *pages(shape, BFLOAT), shape.num_heads, norm, norm, 1e-6)


def mixing(shape: ExpertShape, num_rows: int) -> Run:
    ids, weights = empty(num_rows, shape.top_k, dtype=LONG), empty(num_rows, shape.top_k, dtype=FLOAT)
    arena = (
        empty(shape.num_experts, 2 * shape.width, shape.hidden),
        empty(shape.num_experts, shape.hidden, shape.width),
        empty(shape.num_experts, dtype=INT),
    )
    return lambda: experts.experts(empty(num_rows, shape.hidden), ids, weights, *arena, "silu")


def choosing(shape: ExpertShape) -> Run:
    logits, bias = empty(32, shape.num_experts, dtype=FLOAT), empty(shape.num_experts, dtype=FLOAT) if shape.sigmoid else None
    groups = shape.num_groups, shape.num_kept, shape.counted
    return lambda: gate.gate(logits, bias, shape.top_k, shape.sigmoid, True, 1.0, *groups)


def cases() -> dict[str, Run]:
    found: dict[str, Run] = {}
    for width in HIDDEN:
        found[f"add_norm-{width}"] = lambda width=width: rows.add_norm(empty(8, width), empty(8, width), empty(width), 1e-6)
    for activation in ("silu", "gelu", "gelu_tanh"):
        found[activation] = lambda activation=activation: rows.gated(empty(8, 28_672), activation)
    for shape in ATTENTION:
        found[f"decode-{shape.name}"] = decoding(shape, BFLOAT)
        if not shape.is_latent:  # prompts of latent attention are computed with expanded keys, by torch
            found[f"rope-{shape.name}"] = rotating(shape)
        if shape.num_kv_heads == 8:  # programs of one query head do not differ by how many share a KV head
            found[f"prefill-{shape.name}"] = prefilling(shape, BFLOAT)
    found["decode-float32"] = decoding(ATTENTION[0], FLOAT)
    found["prefill-float32"] = prefilling(ATTENTION[0], FLOAT)
    for mixture in EXPERTS:
        found[f"experts-decode-{mixture.name}"] = mixing(mixture, 32)
        found[f"experts-prefill-{mixture.name}"] = mixing(mixture, 8192)
        found[f"gate-{mixture.name}"] = choosing(mixture)
    return found


CASES = cases()
SEEN: dict[tuple[str, int, str], ahead.Compiled] = {}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", CASES)
def test_a_kernel_builds_within_what_a_card_has(name: str, capability: int) -> None:
    launches = ahead.launches(CASES[name])
    assert launches
    for launch in launches:
        key = launch.kernel.__name__, capability, repr({k: _shown(v) for k, v in launch.arguments.items()})
        found = SEEN[key] = SEEN.get(key) or ahead.compiled(launch, capability)
        assert found.shared_bytes <= SHARED_BYTES[capability], found
        assert found.spilled_bytes == 0, found


def _shown(value: object) -> object:
    return value.dtype if isinstance(value, torch.Tensor) else value


def test_a_kernel_that_takes_too_much_is_seen() -> None:
    (launch,) = ahead.launches(prefilling(ATTENTION[1], BFLOAT))
    greedy = ahead.Launch(
        kernel=launch.kernel, arguments={**launch.arguments, "ROWS": 256}, options={"num_warps": 4, "num_stages": 4}
    )
    found = ahead.compiled(greedy, 80)
    assert found.spilled_bytes > 0 or found.shared_bytes > SHARED_BYTES[80]
