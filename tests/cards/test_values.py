"""Every kernel for cards against its torch reference and, where one exists, against the model's own torch path.

On a card the kernels run there; without one, in Triton's interpreter (``TRITON_INTERPRET=1``), whose bfloat16 stores truncate: that
is what the wider bounds of bfloat16 are for. ``make test`` runs this file in a process of its own, ``make gpu`` on the card.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F

from antiphon.models.cards import ops, reference
from antiphon.models.config import GateConfig
from antiphon.models.experts import gates

KERNELS = torch.ops.antiphon_cards
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16]
BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2 if DEVICE == "cuda" else 2e-2}

if DEVICE == "cpu":
    assert os.environ.get("TRITON_INTERPRET") == "1", "without a card the kernels run in the interpreter only"


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    torch.manual_seed(0)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype).to(DEVICE)


def close(found: torch.Tensor, wanted: torch.Tensor, bound: float) -> None:
    assert found.dtype is wanted.dtype
    assert found.shape == wanted.shape
    worst = (found.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp(min=1e-6)
    assert float(worst) <= bound, float(worst)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [48, 128])
def test_norms(dtype: torch.dtype, width: int) -> None:
    x, y, weight = random(5, width, dtype=dtype), random(5, width, dtype=dtype), random(width, dtype=dtype)
    close(KERNELS.norm(x, weight, 1e-6), F.rms_norm(x, (width,), weight, 1e-6), BOUND[dtype])
    added = x.clone()
    close(KERNELS.add_norm(added, y, weight, 1e-6), F.rms_norm(x + y, (width,), weight, 1e-6), BOUND[dtype])
    close(added, x + y, BOUND[dtype])


def test_a_norm_of_heads_keeps_their_shape() -> None:
    x, weight = random(3, 4, 24), random(24)
    close(KERNELS.norm(x, weight, 1e-6), F.rms_norm(x, (24,), weight, 1e-6), 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_gated_activations(dtype: torch.dtype, activation: str) -> None:
    gate_up = random(3, 140, dtype=dtype)
    close(KERNELS.gated(gate_up, activation), reference.gated(gate_up, activation), BOUND[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "rotary"), [(16, 16), (24, 16)])
@pytest.mark.parametrize("normed", [False, True])
def test_rotation_and_the_cache(dtype: torch.dtype, dim: int, rotary: int, normed: bool) -> None:
    heads, kv_heads = 6, 2
    angles = torch.outer(torch.arange(64.0), torch.rand(rotary // 2)).to(DEVICE)
    qkv = random(4, (heads + 2 * kv_heads) * dim, dtype=dtype)
    k, v = random(40, kv_heads, dim, dtype=dtype), random(40, kv_heads, dim, dtype=dtype)
    norms = (random(dim, dtype=dtype), random(dim, dtype=dtype)) if normed else (None, None)
    positions, slots = torch.tensor([3, 9, 0, 63], device=DEVICE), torch.tensor([5, 39, 0, 7], device=DEVICE)
    mine, theirs = [t.clone() for t in (qkv, k, v)], [t.clone() for t in (qkv, k, v)]
    for run, (a, b, c) in ((KERNELS.rope_and_cache, mine), (reference.rope_and_cache, theirs)):
        run(a, angles.cos(), angles.sin(), positions, slots, b, c, heads, *norms, 1e-6)
    width = (heads * dim, kv_heads * dim)
    close(mine[0][:, : width[0]], theirs[0][:, : width[0]], BOUND[dtype])
    close(mine[1], theirs[1], BOUND[dtype])
    assert torch.equal(mine[2], theirs[2])
    untouched = [slot for slot in range(40) if slot not in slots.tolist()]
    assert torch.equal(mine[1][untouched], k[untouched])


def test_a_padded_row_writes_no_cache() -> None:
    k, v = random(8, 1, 16), random(8, 1, 16)
    before = k.clone(), v.clone()
    ones = torch.ones(4, 8, device=DEVICE)
    slots = torch.tensor([-1, -1], device=DEVICE)
    KERNELS.rope_and_cache(random(2, 48), ones, ones, torch.tensor([0, 1], device=DEVICE), slots, k, v, 1, None, None, 1e-6)
    assert torch.equal(k, before[0])
    assert torch.equal(v, before[1])


ATTENTION = [(6, 2, 24, 24, 0, 1), (6, 2, 32, 32, 5, 3), (4, 4, 16, 16, 0, 2), (20, 1, 80, 64, 0, 2)]


def cache(kv_heads: int, dim: int, dim_v: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    k = random(48, kv_heads, dim, dtype=dtype)
    blocks = torch.stack([torch.randperm(12)[:6] for _ in range(4)]).int().to(DEVICE)
    return k, k[..., :dim_v] if dim_v != dim else random(48, kv_heads, dim_v, dtype=dtype), blocks


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "dim_v", "window", "parts"), ATTENTION)
def test_decode_attention(dtype: torch.dtype, heads: int, kv_heads: int, dim: int, dim_v: int, window: int, parts: int) -> None:
    k, v, blocks = cache(kv_heads, dim, dim_v, dtype)
    lens = torch.tensor([1, 24, 7, 0], device=DEVICE)
    arguments = (random(4, heads, dim, dtype=dtype), k, v, blocks, lens, 4, 0.3, window, parts)
    found = KERNELS.decode_attention(*arguments)
    close(found, reference.decode_attention(*arguments), BOUND[dtype])
    assert torch.equal(KERNELS.decode_attention(*arguments), found)


def test_what_lies_beyond_a_context_is_not_read() -> None:
    k, v, blocks = cache(2, 16, 16, torch.float32)
    lens = torch.tensor([3, 3, 3, 3], device=DEVICE)
    q = random(4, 4, 16)
    clean = KERNELS.decode_attention(q, k, v, blocks, lens, 4, 0.3, 0, 2)
    seen = (blocks[:, 0].long()[:, None] * 4 + torch.arange(3, device=DEVICE)).flatten()
    hidden = torch.ones(48, dtype=torch.bool, device=DEVICE).index_fill_(0, seen, False)
    k[hidden], v[hidden] = float("nan"), float("nan")
    assert torch.equal(KERNELS.decode_attention(q, k, v, blocks, lens, 4, 0.3, 0, 2), clean)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "dim_v", "window", "parts"), [*ATTENTION[:3], (2, 1, 80, 64, 0, 1)])
def test_prefill_attention(dtype: torch.dtype, heads: int, kv_heads: int, dim: int, dim_v: int, window: int, parts: int) -> None:
    k, v, blocks = cache(kv_heads, dim, dim_v, dtype)
    chunks = [torch.tensor(numbers, device=DEVICE) for numbers in ([1, 4, 5], [3, 1, 7], [0, 9, 13])]
    arguments = (random(13, heads, dim, dtype=dtype), k, v, blocks[:3], *chunks, 7, 4, 0.3, window)
    found = KERNELS.prefill_attention(*arguments)
    close(found, reference.prefill_attention(*arguments), BOUND[dtype])
    assert not found[[0, 12]].any()  # rows of no chunk


EXPERTS = [("silu", 7), ("gelu_tanh", 7), ("silu", 40)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("activation", "num_rows"), EXPERTS)
def test_experts(dtype: torch.dtype, activation: str, num_rows: int) -> None:
    hidden, width, slots = 40, 24, 4
    ids = torch.stack([torch.randperm(5)[:3] for _ in range(num_rows)])
    ids[2, 1], ids[4] = -1, -1
    slot_of_id = torch.tensor([2, -1, 0, 3, 1], dtype=torch.int32, device=DEVICE)
    weights = (
        random(slots, 2 * width, hidden, dtype=dtype) / 6,
        random(slots, hidden, width, dtype=dtype) / 5,
    )
    arguments = (random(num_rows, hidden, dtype=dtype), ids.to(DEVICE), torch.rand(num_rows, 3).to(DEVICE), *weights, slot_of_id)
    found, missing = KERNELS.experts(*arguments, activation)
    wanted, _ = reference.experts(*arguments, activation)
    close(found, wanted, BOUND[dtype] * (1 if dtype is torch.float32 else 2))  # four roundings deep
    assert int(missing) == int((ids == 1).sum())  # whose slot is none
    assert not found[4].any()
    assert torch.equal(KERNELS.experts(*arguments, activation)[0], found)


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("groups", [(1, 1, 0), (4, 2, 1), (4, 2, 2)])
def test_gates(sigmoid: bool, biased: bool, groups: tuple[int, int, int]) -> None:
    logits, bias = random(6, 24), random(24) if biased else None
    ids, weights, bad = KERNELS.gate(logits, bias, 4, sigmoid, True, 2.5, *groups)
    config = GateConfig(
        num_experts=24,
        top_k=4,
        scoring="sigmoid" if sigmoid else "softmax",
        renormalise=True,
        scale=2.5,
        choice="group_limited" if groups[2] else "top_k",
        num_groups=groups[0],
        num_kept_groups=groups[1],
        group_score="max" if groups[2] == 1 else "top2_sum",
    )
    wanted_ids, wanted = gates.choose(config, logits, bias)
    assert torch.equal(ids, wanted_ids)
    close(weights, wanted, 1e-5)
    assert not bad.any()


def test_of_equal_scores_the_lowest_id_is_chosen() -> None:
    ids, _, _ = KERNELS.gate(torch.zeros(2, 8, device=DEVICE), None, 3, False, True, 1.0, 1, 1, 0)
    assert ids.tolist() == [[0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_no_number_takes_no_expert_and_is_marked(value: float) -> None:
    logits = random(3, 8)
    logits[1, 5] = value
    ids, weights, bad = KERNELS.gate(logits, None, 2, False, True, 1.0, 1, 1, 0)
    assert bad.tolist() == [0, 1, 0]
    assert ids[1].tolist() == [-1, -1]
    assert weights[1].tolist() == [0.0, 0.0]
    assert (ids[[0, 2]] >= 0).all()


def test_every_op_has_an_implementation_for_tensors_without_memory() -> None:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    long = torch.int64
    pages, table = empty(48, 2, 16), empty(3, 6, dtype=torch.int32)
    angles, at = empty(9, 8), empty(3, dtype=long)
    chosen = empty(3, 2, dtype=long), empty(3, 2)
    made = {
        "norm": KERNELS.norm(empty(3, 8), empty(8), 1e-6).shape,
        "add_norm": KERNELS.add_norm(empty(3, 8), empty(3, 8), empty(8), 1e-6).shape,
        "gated": KERNELS.gated(empty(3, 8), "silu").shape,
        "rope_and_cache": KERNELS.rope_and_cache(empty(3, 128), angles, angles, at, at, pages, pages, 4, None, None, 1e-6),
        "decode_attention": KERNELS.decode_attention(
            empty(3, 4, 16), pages, pages[..., :8], table, empty(3, dtype=long), 4, 0.3, 0, 1
        ).shape,
        "prefill_attention": KERNELS.prefill_attention(
            empty(7, 4, 16), pages, pages, table, *[empty(3, dtype=long)] * 3, 4, 4, 0.3, 0
        ).shape,
        "experts": KERNELS.experts(empty(3, 8), *chosen, empty(4, 12, 8), empty(4, 8, 6), empty(5, dtype=torch.int32), "silu")[
            0
        ].shape,
        "gate": KERNELS.gate(empty(3, 8), None, 2, False, True, 1.0, 1, 1, 0)[0].shape,
    }
    assert made == {
        "norm": (3, 8),
        "add_norm": (3, 8),
        "gated": (3, 4),
        "rope_and_cache": None,
        "decode_attention": (3, 4, 8),
        "prefill_attention": (7, 4, 16),
        "experts": (3, 8),
        "gate": (3, 2),
    }
    assert set(made) == set(ops.NAMES)
