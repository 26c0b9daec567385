"""The lightning indexer against its formula, and its choices when scores are equal."""

from __future__ import annotations

import pytest
import torch

from antiphon.models.attention import indexer
from antiphon.models.attention.indexer import Indexer, _best
from antiphon.models.config import IndexConfig

ROWS, HEADS, DIM, CONTEXT, TOP_K = 5, 3, 8, 17, 6


def test_the_first_of_equal_scores_are_chosen() -> None:
    scores = torch.tensor([[0.0, 2.0, 0.0, 1.0, 0.0, 0.0], [3.0, 3.0, 3.0, 3.0, 3.0, 3.0], [-1.0, 0.0, 5.0, 0.0, 4.0, 0.0]])
    chosen = [[i for i, is_chosen in enumerate(row) if is_chosen] for row in _best(scores, 3).tolist()]
    assert chosen == [[0, 1, 3], [0, 1, 2], [1, 2, 4]]


def test_choices_are_the_highest_scores_of_what_a_row_may_see(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    made = object.__new__(Indexer)
    made._config = IndexConfig(num_heads=HEADS, head_dim=DIM, top_k=TOP_K)
    q, w = torch.randn(ROWS, HEADS, DIM), torch.randn(ROWS, HEADS)
    cache, slots = torch.randn(40, 1, DIM), torch.randperm(40)[:CONTEXT]
    lens = torch.tensor([17, 3, 6, 7, 12])
    seen = torch.arange(CONTEXT) < lens[:, None]
    whole = made.choose(q, w, cache, slots[None], seen)
    monkeypatch.setattr(indexer, "_SCORES", 2 * CONTEXT * HEADS)
    assert torch.equal(made.choose(q, w, cache, slots[None].expand(ROWS, -1), seen), whole)
    for t in range(ROWS):
        scores = []
        for slot in slots[: int(lens[t])].tolist():
            key = cache[slot, 0].tolist()
            products = [sum(a * b for a, b in zip(query, key, strict=True)) for query in q[t].tolist()]
            scores.append(sum(weight * max(product, 0.0) for weight, product in zip(w[t].tolist(), products, strict=True)))
        best = sorted(range(len(scores)), key=lambda c: (-scores[c], c))[:TOP_K]
        assert whole[t].nonzero().flatten().tolist() == sorted(best)
