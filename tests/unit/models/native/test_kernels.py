"""The compiled kernels against their plain torch twins."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from antiphon.core.errors import Unavailable
from antiphon.models.attention.paged import AttentionBatch, Chunk, Shaping, paged_attention, prefill_attention
from antiphon.models.layers.functional import Rope
from antiphon.models.layers.linear import Linear
from antiphon.models.layers.rope_config import RopeConfig
from antiphon.models.native.library import available, build_kernels

BLOCK = 4


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> None:
    try:
        build_kernels()
    except Unavailable as error:
        pytest.skip(f"the kernels can't be compiled here: {error}")
    if not available():
        pytest.skip("the kernels are turned off here")


DTYPES = [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)]


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 50])
def test_norm_equals_torch(dtype: torch.dtype, tolerance: float, rows: int) -> None:
    x, w = torch.randn(rows, 100).to(dtype), torch.randn(100).to(dtype)
    got = torch.ops.antiphon.rms_norm(x, w, 1e-5, 0.0)
    torch.testing.assert_close(got, F.rms_norm(x.float(), (100,), w.float(), 1e-5).to(dtype), atol=tolerance, rtol=tolerance)
    shifted = torch.ops.antiphon.rms_norm(x, w, 1e-5, 1.0)
    expected = F.rms_norm(x.float(), (100,), w.float() + 1.0, 1e-5).to(dtype)
    torch.testing.assert_close(shifted, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_adding_and_norming_advances_the_residual_stream(dtype: torch.dtype, tolerance: float) -> None:
    x, more, w = torch.randn(9, 64).to(dtype), torch.randn(9, 64).to(dtype), torch.randn(64).to(dtype)
    expected_x = x + more
    got = torch.ops.antiphon.add_rms_norm(x, more, w, 1e-5, 0.0)
    assert torch.equal(x, expected_x)
    torch.ops.antiphon.add_rows(x, more)
    assert torch.equal(x, expected_x + more)
    expected = F.rms_norm(expected_x.float(), (64,), w.float(), 1e-5).to(dtype)
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_gated_activation_equals_torch(dtype: torch.dtype, tolerance: float) -> None:
    x = (torch.randn(5, 96) * 8).to(dtype)
    x[0, 0], x[0, 1] = 100.0, -100.0
    expected = (F.silu(x[:, :48].float()) * x[:, 48:].float()).to(dtype)
    torch.testing.assert_close(torch.ops.antiphon.silu_mul(x), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 16), (9, 3, 64), (8, 1, 32), (2, 2, 8)])
@pytest.mark.parametrize("window", [None, 5])
def test_rope_cache_and_decode_attention_equal_the_reference(
    dtype: torch.dtype, tolerance: float, heads: int, kv_heads: int, head_dim: int, window: int | None
) -> None:
    torch.manual_seed(0)
    lens = torch.tensor([1, 7, 30, 12])
    num_blocks = -(-int(lens.max()) // BLOCK)
    tables = torch.randperm(4 * num_blocks).view(4, num_blocks).to(torch.int32)
    num_slots = 4 * num_blocks * BLOCK
    k_cache = torch.randn(num_slots, kv_heads, head_dim).to(dtype)
    v_cache = torch.randn(num_slots, kv_heads, head_dim).to(dtype)
    qkv = torch.randn(4, (heads + 2 * kv_heads) * head_dim).to(dtype)
    rope = RopeConfig(inv_freq=tuple(100.0 ** (-i / head_dim) for i in range(head_dim // 2)))
    angles = torch.outer(torch.arange(64.0), torch.tensor(rope.inv_freq))
    positions = lens - 1
    rows = torch.arange(4)
    slots = tables[rows, positions // BLOCK].long() * BLOCK + positions % BLOCK

    plain = qkv.view(4, heads + 2 * kv_heads, head_dim).float()
    reference = Rope(rope, 64, torch.float32, torch.device("cpu"))
    cos_sin = reference.tables(positions)
    q = reference.rotate(plain[:, :heads], cos_sin).to(dtype)
    k = reference.rotate(plain[:, heads : heads + kv_heads], cos_sin).to(dtype)
    expected_k, expected_v = k_cache.clone(), v_cache.clone()
    expected_k[slots], expected_v[slots] = k, plain[:, heads + kv_heads :].to(dtype)

    torch.ops.antiphon.rope_and_cache(
        qkv, angles.cos(), angles.sin(), positions, slots, k_cache, v_cache, heads, None, None, 1e-6, 0.0
    )
    torch.testing.assert_close(k_cache, expected_k, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(v_cache, expected_v)
    got = torch.ops.antiphon.paged_attention(qkv, k_cache, v_cache, tables, lens, BLOCK, [], [], heads, head_dim**-0.5, window or 0)
    batch = AttentionBatch(
        positions_T=positions,
        slots_T=slots,
        block_size_tokens=BLOCK,
        decode_blocks_BM=tables,
        decode_lens_B=lens,
        chunks=(),
    )
    expected = paged_attention(q.float(), k_cache.float(), v_cache.float(), batch, head_dim**-0.5, window)
    torch.testing.assert_close(got.float(), expected.reshape(4, -1), atol=4 * tolerance, rtol=4 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_s_attention_does_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    lens = torch.tensor([9, 33, 20])
    tables = torch.randperm(27).view(3, 9).to(torch.int32)
    caches = [torch.randn(27 * BLOCK, 2, 16).to(dtype) for _ in range(2)]
    qkv = torch.randn(3, 8 * 16).to(dtype)
    together = torch.ops.antiphon.paged_attention(qkv, *caches, tables, lens, BLOCK, [], [], 4, 0.25, 0)
    for row in range(3):
        one = slice(row, row + 1)
        alone = torch.ops.antiphon.paged_attention(qkv[one], *caches, tables[one], lens[one], BLOCK, [], [], 4, 0.25, 0)
        assert torch.equal(alone, together[one])


# Contexts longer than a kernel's span; heads alone, in groups, and of widths that no vector divides; values narrower than keys.
SHAPES = [(9, 3, 64, 64), (4, 4, 20, 12), (8, 1, 96, 80), (5, 1, 16, 16)]


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "dim_v"), SHAPES)
@pytest.mark.parametrize(("window", "cap", "has_sinks"), [(0, 0.0, False), (70, 0.0, False), (600, 1.5, True)])
def test_a_prompt_s_rows_have_one_result_however_it_is_cut(
    dtype: torch.dtype, tolerance: float, heads: int, kv_heads: int, dim: int, dim_v: int, window: int, cap: float, has_sinks: bool
) -> None:
    """Whole, in chunks beside other requests, and row by row as decodes: bit for bit; and near to the reference in fp32."""
    torch.manual_seed(3)
    num_context, num_rows, scale = 560, 60, dim**-0.5
    k_cache = torch.randn(2 * num_context, kv_heads, dim).to(dtype)
    v_cache = torch.randn(2 * num_context, kv_heads, dim_v).to(dtype)
    slots = torch.randperm(2 * num_context)[:num_context]
    rows = torch.randn(num_rows, heads * dim).to(dtype)
    sinks = torch.randn(heads) if has_sinks else None

    def attention(
        rows: torch.Tensor,
        chunks: dict[int, int],
        tables: torch.Tensor | None = None,
        lens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``chunks``: where each ends in the context, and how many rows it has."""
        ends = [slots[:end].contiguous() for end in chunks]
        out: torch.Tensor = torch.ops.antiphon.paged_attention(
            *(rows, k_cache, v_cache, tables, lens, 1, ends, list(chunks.values()), heads, scale, window, cap, sinks)
        )
        return out

    whole = attention(rows, {num_context: num_rows})
    past = num_context - num_rows
    for cut in (1, 17, 59):
        parts = attention(rows, {past + cut: cut, num_context: num_rows - cut})
        assert torch.equal(parts, whole)
    lens = torch.arange(past + 1, num_context + 1)
    tables = slots.to(torch.int32).expand(num_rows, -1).contiguous()
    assert torch.equal(attention(rows, {}, tables, lens), whole)  # rows of one request behind each other are taken together,
    assert torch.equal(attention(rows.flip(0), {}, tables, lens.flip(0)).flip(0), whole)  # and these alone
    for cache in (k_cache, v_cache):  # a row that is no number, a draft's, say, stays so alone
        cache[slots[-1]], kept = torch.nan, cache[slots[-1]].clone()
        for broken in (attention(rows, {num_context: num_rows}), attention(rows, {}, tables, lens)):
            assert torch.equal(broken[:-1], whole[:-1])
            assert broken[-1].isnan().any()
        cache[slots[-1]] = kept
    mixed = attention(rows, {num_context: num_rows - 2}, tables[:2], lens[:2])
    assert torch.equal(mixed, whole)

    expected = prefill_attention(
        rows.view(num_rows, heads, dim).double(),
        *(cache.double() for cache in (k_cache, v_cache)),
        Chunk(first_row=0, num_rows=num_rows, context_slots=slots),
        scale,
        window or None,
        Shaping(softcap=cap or None, sinks_N=sinks),
    )
    torch.testing.assert_close(whole.double(), expected.flatten(1), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(("cap", "has_sinks"), [(1.5, False), (None, True), (1.5, True)])
def test_decodes_with_bounded_scores_and_sinks_equal_the_reference(
    dtype: torch.dtype, tolerance: float, cap: float | None, has_sinks: bool
) -> None:
    torch.manual_seed(2)
    lens = torch.tensor([9, 33, 20])
    tables = torch.randperm(27).view(3, 9).to(torch.int32)
    caches = [torch.randn(27 * BLOCK, 2, 16).to(dtype) for _ in range(2)]
    qkv = (torch.randn(3, 8 * 16) * 3).to(dtype)
    sinks = torch.randn(4) * 3 if has_sinks else None
    got = torch.ops.antiphon.paged_attention(qkv, *caches, tables, lens, BLOCK, [], [], 4, 0.25, 12, cap or 0.0, sinks)
    batch = AttentionBatch(
        positions_T=lens - 1, slots_T=lens, block_size_tokens=BLOCK, decode_blocks_BM=tables, decode_lens_B=lens, chunks=()
    )
    q_BNH = qkv[:, :64].view(3, 4, 16).float()
    shaping = Shaping(softcap=cap, sinks_N=sinks)
    expected = paged_attention(q_BNH, *(cache.float() for cache in caches), batch, 0.25, 12, shaping)
    torch.testing.assert_close(got.float(), expected.reshape(3, -1), atol=4 * tolerance, rtol=4 * tolerance)


@pytest.mark.parametrize(("num_inputs", "num_outputs"), [(577, 13), (64, 4), (7, 3)])
def test_a_few_rows_times_weights_equal_sums_in_fp64_and_a_row_is_its_own_whatever_stands_beside_it(
    num_inputs: int, num_outputs: int
) -> None:
    torch.manual_seed(3)
    weight, bias = torch.randn(num_outputs, num_inputs).bfloat16(), torch.randn(num_outputs).bfloat16()
    for num_rows in (1, 2, 3, 4, 9):
        x = torch.randn(num_rows, num_inputs).bfloat16()
        wide = torch.ops.antiphon.row_linear(x, weight, bias, True)
        torch.testing.assert_close(wide, (x.double() @ weight.double().T + bias.double()).float(), atol=1e-3, rtol=1e-4)
        assert torch.equal(torch.ops.antiphon.row_linear(x, weight, bias, False), wide.bfloat16())
        for row in range(num_rows):
            assert torch.equal(torch.ops.antiphon.row_linear(x[row : row + 1], weight, bias, True)[0], wide[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_inputs", "num_outputs"), [(1100, 70), (577, 13), (64, 32), (7, 3)])
def test_a_weight_in_blocks_gives_sums_in_fp64_and_a_row_is_its_own_whatever_stands_beside_it(
    dtype: torch.dtype, num_inputs: int, num_outputs: int
) -> None:
    """More rows than a panel, widths that are no multiple of anything, and inputs of more than one chain."""
    torch.manual_seed(4)
    weight, bias = torch.randn(num_outputs, num_inputs).to(dtype), torch.randn(num_outputs).to(dtype)
    packed = torch.ops.antiphon.pack_linear(weight)
    x = torch.randn(140, num_inputs).to(dtype)
    wide = torch.ops.antiphon.packed_linear(x, packed, bias, num_outputs, True)
    expected = x.double() @ weight.double().T + bias.double()
    torch.testing.assert_close(wide.double(), expected, atol=1e-4 if dtype is torch.float32 else 1e-3, rtol=1e-5)
    assert torch.equal(torch.ops.antiphon.packed_linear(x, packed, bias, num_outputs, False), wide.to(dtype))
    assert torch.equal(torch.ops.antiphon.packed_linear(x, packed, None, num_outputs, True) + bias.float(), wide)
    for num_rows in (*range(1, 18), 31, 33, 129):
        for first in (0, 3):
            part = torch.ops.antiphon.packed_linear(x[first : first + num_rows], packed, bias, num_outputs, True)
            assert torch.equal(part, wide[first : first + num_rows])


def test_the_plain_linear_is_by_rows() -> None:
    torch.manual_seed(5)
    for bias in (None, torch.randn(24).bfloat16()):
        linear = Linear(torch.randn(24, 40).bfloat16(), bias)
        x = torch.randn(50, 40).bfloat16()
        assert torch.equal(linear(x)[2:4], linear(x[2:4]))
        assert torch.equal(linear.in_fp32(x).bfloat16(), linear(x))
        assert not torch.equal(linear.in_fp32(x), linear(x).float())
