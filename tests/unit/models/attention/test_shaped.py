"""Scores that are bounded or share their softmax with sinks, against the formula in plain numbers."""

from __future__ import annotations

import math

import pytest
import torch

from antiphon.models.attention import paged
from antiphon.models.attention.paged import Chunk, Shaping, prefill_attention

HEADS, KV_HEADS, DIM, CONTEXT, ROWS = 4, 2, 8, 23, 11
SCALE = 0.7


def plainly(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, row: int, head: int, window: int | None, shaping: Shaping
) -> list[float]:
    """One row of one head: exp(score_i) / (exp(sink) + sum of exp(score_j)) over the tokens it sees."""
    place, kv_head = CONTEXT - ROWS + row, head // (HEADS // KV_HEADS)
    masses, total = [], 0.0
    for token in range(place + 1):
        if window is not None and token <= place - window:
            continue
        score = SCALE * sum(float(a) * float(b) for a, b in zip(q[row, head], k[token, kv_head], strict=True))
        if shaping.softcap is not None:
            score = shaping.softcap * math.tanh(score / shaping.softcap)
        masses.append((token, math.exp(score)))
        total += masses[-1][1]
    if shaping.sinks_N is not None:
        total += math.exp(float(shaping.sinks_N[head]))
    return [sum(mass / total * float(v[token, kv_head, i]) for token, mass in masses) for i in range(DIM)]


@pytest.mark.parametrize("cap", [None, 0.8])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 5])
def test_a_chunk_equals_the_formula_whatever_the_rows_at_once(
    monkeypatch: pytest.MonkeyPatch, cap: float | None, has_sinks: bool, window: int | None
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(paged, "_ROWS", 4)
    slots = torch.randperm(40)[:CONTEXT]
    k_cache, v_cache = (torch.randn(40, KV_HEADS, DIM, dtype=torch.float64) for _ in range(2))
    q = torch.randn(ROWS, HEADS, DIM, dtype=torch.float64)
    shaping = Shaping(softcap=cap, sinks_N=torch.randn(HEADS) * 2 if has_sinks else None)
    chunk = Chunk(first_row=0, num_rows=ROWS, context_slots=slots)
    got = prefill_attention(q, k_cache, v_cache, chunk, SCALE, window, shaping)
    k, v = k_cache[slots], v_cache[slots]
    for row in range(ROWS):
        for head in range(HEADS):
            assert got[row, head].tolist() == pytest.approx(plainly(q, k, v, row, head, window, shaping), abs=1e-6)
