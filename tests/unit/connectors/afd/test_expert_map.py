"""Splitting rows by expert group: every choice exactly once, only to holders, shared experts for free."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.connectors.afd.expert_map import ExpertMap
from antiphon.models.config import DecoderConfig
from antiphon.models.experts.placement import ExpertPlacement
from antiphon.models.experts.routing import NO_EXPERT, Routing
from antiphon.models.families import describe

EXPERTS = 8


def model(*, shared: bool) -> DecoderConfig:
    raw = {
        "architectures": ["Qwen2MoeForCausalLM"],
        "hidden_size": 8,
        "intermediate_size": 8,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8 if shared else 0,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 3,
        "vocab_size": 10,
        "max_position_embeddings": 16,
    }
    return describe(raw)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 4), st.integers(0, 8), st.integers(1, 20), st.booleans(), st.booleans(), st.integers(0, 10_000))
def test_every_choice_goes_to_exactly_one_holder(
    num_groups: int, redundant: int, num_rows: int, shared: bool, sparse: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    config = model(shared=shared)
    placement = ExpertPlacement.balanced(config, {1: torch.rand(EXPERTS).tolist()}, num_groups, redundant)
    ids = torch.stack([torch.randperm(EXPERTS)[:3] for _ in range(num_rows)])
    if sparse:
        ids = ids.masked_fill(torch.rand(ids.shape) < 0.4, NO_EXPERT)
    if shared:
        ids = torch.cat((ids, torch.full((num_rows, 1), EXPERTS)), dim=1)
    weights = torch.rand(ids.shape)
    shares = ExpertMap(config, placement).split(1, Routing(ids_TK=ids, weights_TK=weights, is_full=not sparse))
    times = torch.zeros(num_rows, ids.shape[1], dtype=torch.int64)
    for group, share in enumerate(shares):
        if share is None:
            continue
        assert share.ids_RK is not None
        assert share.weights_RK is not None
        rows = torch.arange(num_rows) if share.rows_R is None else share.rows_R
        assert share.num_rows == len(rows) == len(set(rows.tolist()))
        for row, got, by in zip(rows.tolist(), share.ids_RK, share.weights_RK, strict=True):
            routed = [e for e in got.tolist() if 0 <= e < EXPERTS]
            assert all(group in placement.groups[1][e] for e in routed)
            has_routed = any(0 <= e < EXPERTS for e in ids[row].tolist())
            assert routed or not has_routed, "a row travels for its shared expert alone only where it has no other"
            mine = got >= 0
            assert torch.equal(got[mine], ids[row][mine])
            assert torch.equal(by[mine], weights[row][mine])
            times[row] += mine
    assert torch.equal(times, (ids >= 0).long())


def test_copies_share_the_rows_of_a_hot_expert() -> None:
    config = model(shared=False)
    owners = tuple((0, 1) if e == 0 else (e % 2,) for e in range(EXPERTS))
    split = ExpertMap(config, ExpertPlacement(num_groups=2, groups=(owners, owners))).split
    ids = torch.zeros(40, 1, dtype=torch.int64)
    shares = split(0, Routing(ids_TK=ids, weights_TK=torch.ones(40, 1), is_full=True))
    assert [share.num_rows for share in shares if share is not None] == [20, 20]


def test_a_zipf_load_is_evened_out_by_the_rows_that_were_counted() -> None:
    torch.manual_seed(3)
    num_experts, num_groups = 32, 2
    raw = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": 8,
        "intermediate_size": 8,
        "moe_intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_experts": num_experts,
        "num_experts_per_tok": 4,
        "vocab_size": 10,
        "max_position_embeddings": 16,
    }
    config = describe(raw)
    popularity = 1.0 / torch.arange(1, num_experts + 1) ** 1.2
    ids = torch.stack([torch.multinomial(popularity, 4) for _ in range(2000)])
    routing = Routing(ids_TK=ids, weights_TK=torch.ones(ids.shape), is_full=True)

    def unevenness(placement: ExpertPlacement) -> tuple[float, float]:
        """Largest over mean, of rows and of computed (row, expert) pairs per group."""
        shares = [share for share in ExpertMap(config, placement).split(0, routing) if share is not None]
        rows = [share.num_rows for share in shares]
        pairs = [int((share.ids_RK >= 0).sum()) for share in shares if share.ids_RK is not None]
        return max(rows) * num_groups / sum(rows), max(pairs) * num_groups / sum(pairs)

    counted = torch.bincount(ids.flatten(), minlength=num_experts).tolist()
    before = unevenness(ExpertPlacement.spread(config, num_groups))
    after = unevenness(ExpertPlacement.balanced(config, {0: counted}, num_groups, num_redundant=2))
    assert before[0] > 1.15
    assert before[1] > 1.4
    assert max(after) < 1.15
