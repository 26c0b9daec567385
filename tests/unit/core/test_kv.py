"""Sizes of what a sequence holds, and what both ends of a hand-off must agree on."""

from __future__ import annotations

from dataclasses import replace

from antiphon.core.kv import LIVE_STATES, KVLayout, KVPlane, StatePlane

PLANES = (KVPlane(name="k", num_heads=2, head_dim=256), KVPlane(name="v", num_heads=2, head_dim=256))
PLAIN = KVLayout(num_layers=48, planes=PLANES, block_size_tokens=16, dtype="bfloat16", itemsize_bytes=2)
STATES = (
    StatePlane(name="conv", shape=(3, 8192), dtype="bfloat16", itemsize_bytes=2),
    StatePlane(name="delta", shape=(32, 128, 128), dtype="float32", itemsize_bytes=4),
)
QWEN3_NEXT = replace(PLAIN, states=STATES, state_layers=tuple(i for i in range(48) if i % 4 != 3))
PURE = replace(PLAIN, num_layers=12, planes=(), states=STATES, state_layers=tuple(range(12)))


def test_a_sequence_of_state_layers_alone_is_as_large_at_32k_tokens_as_at_1k() -> None:
    assert PURE.token_bytes == PURE.block_bytes == 0
    assert PURE.sequence_bytes(1024) == PURE.sequence_bytes(32 * 1024) == LIVE_STATES * 12 * (3 * 8192 * 2 + 32 * 128 * 128 * 4)


def test_layers_with_a_state_cache_nothing_per_token() -> None:
    assert QWEN3_NEXT.kv_layers == tuple(range(3, 48, 4))
    assert QWEN3_NEXT.token_bytes == PLAIN.token_bytes // 4
    grown = QWEN3_NEXT.sequence_bytes(32 * 1024) - QWEN3_NEXT.sequence_bytes(1024)
    assert grown == 31 * 1024 * QWEN3_NEXT.token_bytes


def test_both_ends_of_a_hand_off_must_have_the_same_states() -> None:
    assert PLAIN.fingerprint == "layers=48;planes=k:2x256,v:2x256;dtype=bfloat16", "as it always was"
    assert not PLAIN.has_state
    fingerprints = {
        layout.fingerprint
        for layout in (
            PLAIN,
            QWEN3_NEXT,
            replace(QWEN3_NEXT, state_layers=QWEN3_NEXT.state_layers[1:]),
            replace(QWEN3_NEXT, states=(replace(STATES[0], dtype="float32"), STATES[1])),
            replace(QWEN3_NEXT, states=(STATES[0], replace(STATES[1], shape=(32, 128, 64)))),
        )
    }
    assert len(fingerprints) == 5
